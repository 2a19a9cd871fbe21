"""Whether nothing is under way at some members, so that they may stop."""

from __future__ import annotations

from collections.abc import Set

from common.samples import Latencies
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import AgentPeer

_BUSY = ("agent_jobs", "agent_tier_write_queue_bytes", "agent_tier_blocks_in_flight")
"""Samples of an agent that are 0 when it has nothing to deliver, to pull, to read or to write."""


def is_idle(members: Membership, names: Set[str]) -> bool:
    """Those that do not live have nothing under way any more."""
    engines = [members.engines[name] for name in names & members.engines.keys()]
    agents = [members.agents[name] for name in names & members.agents.keys()]
    computing = any(
        engine.hello is not None and engine.hello.load.sequences
        for engine in engines
        if members.alive(engine)
    )
    return not computing and not any(map(_is_busy, filter(members.alive, agents)))


def _is_busy(agent: AgentPeer) -> bool:
    if agent.status is None:
        return False
    load = agent.status.load
    if any(load.read_queue_bytes.values()) or load.deliver_queue_bytes:
        return True
    return any(
        sample.metric in _BUSY and not isinstance(sample.value, Latencies) and sample.value > 0
        for sample in agent.status.samples
    )
