"""Settings of whoever has Ray start a cluster."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from launch.settings import SWITCH, require, setting, text


@dataclass(frozen=True)
class RayAddress:
    """Where Ray is."""

    ray_address: str = setting(
        "auto",
        "Where Ray's head is; auto is the one that this host has joined (`ray start`).",
        text("HOST:PORT"),
    )


@dataclass(frozen=True)
class RaySettings(RayAddress):
    """What is started, and where."""

    ray: bool = setting(
        False,
        "Start the gateway and the engines as nodes on the hosts of a Ray cluster "
        "(docs/deploy.md), not on this one.",
        SWITCH,
    )
    hosts: str = setting(
        "",
        "With --ray: YAML or TOML file of pools of nodes, beside the sections that --profile of "
        "launch.node has; empty means --prefill and --decode engines, wherever there is room.",
        text("FILE"),
    )


def check_ray(config: RaySettings) -> None:
    """Raises :class:`~launch.settings.BadConfig`."""
    require(config.ray or not config.hosts, "--hosts without --ray: add --ray, by which they are.")


def check_installed() -> None:
    """Raises :class:`~launch.settings.BadConfig`."""
    require(
        importlib.util.find_spec("ray") is not None,
        "ray cannot be imported: install the extra `ray` (`make setup RAY=1`), in the same version "
        "on every host.",
    )
