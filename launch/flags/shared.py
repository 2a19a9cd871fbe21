"""What every command of a cluster is told alike."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from common.tracing.spans import missing_packages
from launch.gateway.config import GatewayConfig
from launch.gateway.doors.settings import DoorSettings
from launch.settings import BadConfig, flag, owned, require, setting, settings_of, text
from transfer.control.keys import SECRET_CHARS_MIN, BadSecret, read_secret


@dataclass(frozen=True)
class ModelSettings:
    """What is served."""

    model: str = setting(
        "default",
        "Folder of a model, name on a hub (org/name), `default` "
        "(SmolLM2-135M-Instruct, built at set-up), or `tiny`, `tiny-dsa` and other random ones of "
        "the tests (docs/models.md).",
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
    otlp_traces_endpoint: str = owned(GatewayConfig, "otlp_traces_endpoint", text("HOST:PORT"))


def cluster_secret(config: SharedSettings) -> str:
    """From its file; a new one where one launcher owns every end."""
    if not config.cluster_secret_file:
        return secrets.token_hex(SECRET_CHARS_MIN)
    try:
        return read_secret(Path(config.cluster_secret_file).expanduser())
    except BadSecret as error:
        raise BadConfig(f"--cluster-secret-file {error}.") from error


def check_tracing(config: SharedSettings) -> None:
    """The packages that send traces are there, if any are to be sent. Raises ``BadConfig``."""
    endpoint = config.otlp_traces_endpoint
    if endpoint and (missing := missing_packages()):
        raise BadConfig(
            f"--otlp-traces-endpoint {endpoint}: {', '.join(missing)} cannot be imported. Install "
            "the extra `trace` (docs/dependencies.md), or run `make setup`."
        )


_MAY_BE_ZERO = ("remote_ttl_s", "remote_hedge_s", "nic_bytes_per_s")
"""Where zero means never, or not known."""


def check_numbers(config: object) -> None:
    """Times and bounds are positive, sizes not negative. Raises
    :class:`~launch.settings.BadConfig`."""
    names = list(settings_of(type(config)))
    for name in names:
        value = getattr(config, name)
        if name.endswith(("_s", "_max")) and name not in _MAY_BE_ZERO:
            require(value > 0, f"{flag(name)} {value}: give a number greater than 0.")
        if name.endswith("_bytes") or name in (*_MAY_BE_ZERO, "max_total_tokens", "beta_tokens"):
            require(value >= 0, f"{flag(name)}: give 0 or more.")
