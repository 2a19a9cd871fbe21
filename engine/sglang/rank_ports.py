"""Ports of an engine's ranks: each has its own, and all hear the cluster's hosts alone."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

from sglang.srt.runtime_context import get_parallel

from common import mooncake_ports
from engine.config import EngineConfig
from engine.sglang.border import Use
from transfer.ports.source_filter import admit_only

USES = (
    Use("runtime_context.get_parallel", "this process's place among the ranks"),
    Use("runtime_context.ParallelContext.tp_rank", "which rank it is"),
    Use("server_args.ServerArgs.tp_size", "of how many; published as a field of the same"),
)


def before_mooncake(*_: Any, **__: Any) -> None:
    """BEFORE ``init_mooncake_transfer_engine``."""
    parallel = get_parallel()
    take_own_ports(os.environ, parallel.tp_rank, parallel.tp_size)


def after_ports_open(_result: object, *_: Any, **__: Any) -> None:
    """AFTER what opens ports that are bound to every address."""
    admit_only(EngineConfig.from_env().heard)


def take_own_ports(environ: MutableMapping[str, str], rank: int, ranks: int) -> None:
    """Narrow an engine's range of ports for Mooncake to one rank's part of it."""
    if (ports := mooncake_ports.from_env(environ)) is not None:
        environ.update(mooncake_ports.to_env(mooncake_ports.of_rank(ports, rank, ranks)))
