"""The numbers that nodes' processes start with: they grow from start to start of a name."""

from __future__ import annotations

from common.ids import Incarnation
from launch.gateway.registry.clock import ClusterClock
from launch.gateway.registry.node import HostsOfEngine, Node

_TURNS = 1024
"""Another gateway may have given other turns: one begins anywhere among so many."""


class Incarnations:
    """Gives them out, to all hosts of an engine the same."""

    def __init__(self) -> None:
        self._clock = ClusterClock()
        self._groups: dict[str, HostsOfEngine] = {}
        """By engine."""

    def seen(self, incarnation: int) -> None:
        """Somebody has had it."""
        self._clock.note(incarnation)

    def begin(self, node: Node) -> None:
        """Its processes start anew: with those of the other hosts if these wait for it, else the
        other hosts are to start anew, too."""
        group = self._groups.get(node.group)
        if group is None or node.rank in group.started:
            node.incarnation = self._clock.next()
            if node.group:
                self._groups[node.group] = HostsOfEngine(node.incarnation, {node.rank})
        else:
            node.incarnation = group.incarnation
            group.started.add(node.rank)
        node.turn = node.turn + 1 if node.turn else node.incarnation // 1000 % _TURNS + 1

    def keep(self, node: Node, incarnation: Incarnation) -> None:
        """Its processes go on, which this gateway has not known."""
        node.incarnation = incarnation
        if node.group:
            group = self._groups.setdefault(node.group, HostsOfEngine(incarnation))
            if incarnation > group.incarnation:
                group = self._groups[node.group] = HostsOfEngine(incarnation)
            self.renewed(node, incarnation)

    def renewed(self, node: Node, incarnation: int) -> None:
        """What its processes run as; :attr:`Node.incarnation` is then what they are to run as."""
        self.seen(incarnation)
        group = self._groups.get(node.group)
        if group is not None:
            node.incarnation = group.incarnation
            if incarnation == group.incarnation:
                group.started.add(node.rank)

    def restart(self, node: Node, ended: int) -> None:
        """A process of it has ended; another host may have said so before."""
        self.seen(ended)
        group = self._groups.get(node.group)
        if group is not None and ended < group.incarnation:
            group.started.discard(node.rank)
        elif group is not None:
            group.started.add(node.rank)
        self.begin(node)

    def forget(self, engine: str) -> None:
        """None of its hosts is there any more."""
        self._groups.pop(engine, None)
