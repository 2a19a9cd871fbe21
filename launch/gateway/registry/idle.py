"""Whether nothing is under way at some members, so that they may stop."""

from __future__ import annotations

from collections.abc import Set

from common.loads import AgentLoad
from common.samples import Latencies
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import AgentPeer, EnginePeer

_BUSY = (
    "engine_open_jobs",
    "agent_jobs",
    "agent_tier_write_queue_bytes",
    "agent_tier_blocks_in_flight",
)
"""Samples that are 0 when an engine waits for no agent, and when an agent has nothing to deliver,
to pull, to read or to write."""


def is_idle(members: Membership, names: Set[str]) -> bool:
    """Those that do not live have nothing under way any more."""
    living = (peer for peer in members.peers() if peer.name in names and members.alive(peer))
    return not any(_is_busy(peer) for peer in living)


def _is_busy(peer: AgentPeer | EnginePeer) -> bool:
    if isinstance(peer, EnginePeer):
        is_at_work = peer.hello is not None and peer.hello.load.sequences > 0
    else:
        is_at_work = peer.status is not None and _has_queued(peer.status.load)
    return is_at_work or any(
        sample.metric in _BUSY and not isinstance(sample.value, Latencies) and sample.value > 0
        for sample in peer.samples()
    )


def _has_queued(load: AgentLoad) -> bool:
    return any(load.read_queue_bytes.values()) or load.deliver_queue_bytes > 0
