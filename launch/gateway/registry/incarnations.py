"""The numbers that nodes' processes start with: they grow from start to start of a name."""

from __future__ import annotations

from common.cluster.clock import ClusterClock
from common.ids import Incarnation
from launch.gateway.registry.node import HostsOfEngine, Node

_TURNS = 1024


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
            node.turn = self._turn_after(max(node.turn, group.turn if group is not None else 0))
            if not node.group:
                return
            group = self._groups[node.group] = HostsOfEngine(node.incarnation, node.turn)
        node.incarnation, node.turn = group.incarnation, group.turn
        group.started.add(node.rank)

    def keep(self, node: Node, incarnation: Incarnation) -> None:
        """Its processes go on, which this gateway has not known."""
        node.incarnation = incarnation
        if node.group:
            group = self._groups.get(node.group)
            if group is None or incarnation > group.incarnation:
                self._groups[node.group] = HostsOfEngine(incarnation, node.turn)
            self.renewed(node, incarnation)

    def lost(self, node: Node) -> None:
        """It is silent, or has left. What began together with it is to start anew, and waits for
        it then."""
        group = self._groups.get(node.group)
        if group is not None and node.rank in group.started:
            self._groups[node.group] = HostsOfEngine(
                self._clock.next(), self._turn_after(group.turn)
            )

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

    def copied(self) -> tuple[int, dict[str, HostsOfEngine]]:
        """The greatest number that was given, and the engines over several hosts; for a standby."""
        return self._clock.last, self._groups

    def mirror(self, last: int, groups: dict[str, HostsOfEngine]) -> None:
        """Have the same as another gateway."""
        self._clock.note(last)
        self._groups = groups

    def _turn_after(self, turn: int) -> int:
        """Another gateway may have given other turns than this one knows of: the first is any."""
        return turn + 1 if turn else self._clock.next() // 1000 % _TURNS + 1
