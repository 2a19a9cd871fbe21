"""Agents and engines that come and go while the gateway runs."""

from __future__ import annotations

import logging

from common.cluster.membership import AgentAddress, EngineAddress
from launch.gateway.peers.control_plane import ControlPlane
from launch.gateway.peers.http_probe import HttpProbe
from launch.gateway.peers.peer import EnginePeer

log = logging.getLogger(__name__)


class Roster:
    """Adds them to all that knows peers, and removes them again without a trace."""

    def __init__(self, plane: ControlPlane, probe: HttpProbe) -> None:
        self._plane = plane
        self._probe = probe
        self._members = plane.members

    def add(self, agents: list[AgentAddress], engines: list[EngineAddress]) -> None:
        """Those that are not there yet; one with another address than before takes its place."""
        fresh_agents = [a for a in agents if not self._is_there(a)]
        fresh_engines = [e for e in engines if not self._is_there(e)]
        for name in (*(e.name for e in fresh_engines), *(a.name for a in fresh_agents)):
            self._remove(name)
        for agent in fresh_agents:
            peer = self._members.add_agent(agent.name, agent.control)
            self._plane.plans.watch(peer)
            self._plane.serve(peer)
        for engine in fresh_engines:
            added = self._members.add_engine(engine)
            self._plane.serve(added)
            self._probe.watch(added)
        if fresh_agents or fresh_engines:
            log.info("members added agents=%s engines=%s", *_names(fresh_agents, fresh_engines))
            self._plane.known.changed()

    def remove(self, names: list[str]) -> None:
        """Engines before their agent."""
        removed = [name for name in names if self._remove(name)]
        if removed:
            log.info("members removed names=%s", removed)
            self._plane.known.changed()
            self._plane.changed.set()

    def _is_there(self, address: AgentAddress | EngineAddress) -> bool:
        if isinstance(address, EngineAddress):
            engine = self._members.engines.get(address.name)
            return engine is not None and engine.address == address
        agent = self._members.agents.get(address.name)
        return agent is not None and agent.endpoint == address.control

    def _remove(self, name: str) -> bool:
        peer = self._members.pop(name)
        if peer is None:
            return False
        if isinstance(peer, EnginePeer):
            self._probe.forget(name)
            self._plane.http_state(peer, alive=False)
        peer.notify("left the cluster")
        self._plane.serving.pop(name).cancel()
        peer.close()
        self._plane.scheduler.removed(name)
        return True


def _names(agents: list[AgentAddress], engines: list[EngineAddress]) -> tuple[list[str], list[str]]:
    return [agent.name for agent in agents], [engine.name for engine in engines]
