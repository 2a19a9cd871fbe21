"""Ports that each rank of an engine has to itself."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

_MIN_RPC_PORT, _MAX_RPC_PORT = "MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT"
"""Mooncake's variables, which :mod:`launch.cluster.ports` sets for all ranks of an engine."""


def before_mooncake(*_: Any, **__: Any) -> None:
    """BEFORE ``init_mooncake_transfer_engine``."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    take_own_ports(os.environ, parallel.tp_rank, parallel.tp_size)


def take_own_ports(environ: MutableMapping[str, str], rank: int, ranks: int) -> None:
    """Narrow an engine's range of ports for Mooncake to one rank's part of it.

    Mooncake looks for a free port some time before it binds it: ranks that choose among the same
    ports sometimes choose the same one, and the engine does not start.
    """
    if _MIN_RPC_PORT not in environ:
        return
    first, last = int(environ[_MIN_RPC_PORT]), int(environ[_MAX_RPC_PORT])
    own = (last + 1 - first) // ranks
    environ[_MIN_RPC_PORT] = str(first + rank * own)
    environ[_MAX_RPC_PORT] = str(first + (rank + 1) * own - 1)
