"""Every setting of ``python -m launch.cluster``, each declared once (:mod:`launch.settings`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from launch import settings
from launch.flags.gateway import GatewaySettings, check_gateway
from launch.flags.node import NodeSettings, check_node
from launch.flags.ray import RaySettings, check_ray
from launch.flags.shared import ModelSettings, check_numbers
from launch.settings import check_choices, flag, integer, load_settings, require, setting
from scheduler.policies import experiment_of, read_policy


@dataclass(frozen=True)
class EngineCounts(ModelSettings):
    """How much of it one command starts."""

    prefill: int = setting(1, "Number of prefill engines.", integer("N"))
    decode: int = setting(1, "Number of decode engines.", integer("M"))


@dataclass(frozen=True)
class ClusterConfig(RaySettings, NodeSettings, GatewaySettings, EngineCounts):
    """What the user asked for. Build with :func:`load_config`, which also checks it."""

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        for name in ("prefill", "decode"):
            require(getattr(self, name) >= 1, f"{flag(name)}: at least 1 engine is needed.")
        check_gateway(self)
        check_node(self)
        check_ray(self)

    @property
    def is_zero_io(self) -> bool:
        """The path policy is one for measurements, whose plans read nothing."""
        return experiment_of(read_policy(self.path_policy)).zero_io

    @property
    def first_port(self) -> int:
        return self.base_port or self.port + 100

    @property
    def log_name(self) -> str:
        return str(self.port)


def load_config(argv: Sequence[str]) -> ClusterConfig:
    """Flags over file over defaults; raises :class:`~launch.settings.BadConfig`."""
    return load_settings(ClusterConfig, make_parser(), argv)


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``python -m launch.cluster``."""
    return settings.make_parser(
        ClusterConfig,
        "python -m launch.cluster",
        "Serve a model from prefill and decode engines with a shared KV store.",
    )
