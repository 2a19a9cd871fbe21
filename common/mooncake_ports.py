"""Ports that Mooncake may take: a range, in the environment of its process.

The launcher gives one to each process (:mod:`launch.cluster.ports`), an engine a part of it to
each of its ranks (:mod:`engine.sglang.rank_ports`).
"""

from __future__ import annotations

from collections.abc import Mapping

_FIRST, _LAST = "MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT"


def to_env(ports: range) -> dict[str, str]:
    """The variables for a process that is to take only these."""
    return {_FIRST: str(ports.start), _LAST: str(ports.stop - 1)}


def from_env(env: Mapping[str, str]) -> range | None:
    """None if nobody chose, and Mooncake does."""
    if _FIRST not in env:
        return None
    return range(int(env[_FIRST]), int(env[_LAST]) + 1)


def of_rank(ports: range, rank: int, ranks: int) -> range:
    """A rank's equal part.

    Mooncake looks for a free port some time before it binds it: ranks that choose among the same
    ports sometimes choose the same one, and the engine does not start.
    """
    each = len(ports) // ranks
    return ports[rank * each : (rank + 1) * each]
