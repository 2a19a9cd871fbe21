"""What every command of a cluster is told alike."""

from __future__ import annotations

from dataclasses import dataclass

from launch.gateway.doors.settings import DoorSettings
from launch.settings import owned, setting, text


@dataclass(frozen=True)
class ModelSettings:
    """What is served."""

    model: str = setting(
        "default",
        "Folder of a model, name on a hub (org/name), `tiny` (random, for tests) or `default` "
        "(SmolLM2-135M-Instruct, built at set-up).",
        text("PATH|NAME"),
    )


@dataclass(frozen=True)
class SharedSettings:
    """Who belongs to the cluster, and how its gateway is known."""

    cluster_secret_file: str = setting(
        "",
        "File (mode 0600) with the secret of which the keys of control connections are made; empty "
        "means a new one at each start (docs/security.md).",
        text("FILE"),
    )
    ssl_ca_certs: str = owned(DoorSettings, "ssl_ca_certs", text("PATH"))
