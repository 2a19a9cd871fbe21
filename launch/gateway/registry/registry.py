"""Which nodes there are: soft state, made of what they say themselves, and kept alive by them."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Set

from common.cluster.membership import (
    EXPIRY_S,
    Joined,
    JoinRequest,
    LeaveRequest,
    Left,
    NodeMembers,
    Renewal,
    Renewed,
    Restarted,
    RestartRequest,
    Role,
    State,
)
from common.ids import Incarnation, PlanId
from launch.gateway.errors import Conflict, NotFound
from launch.gateway.orders import Orders
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.roster import Roster
from launch.gateway.registry.counts import Change, NodeCounts
from launch.gateway.registry.idle import is_idle
from launch.gateway.registry.incarnations import Incarnations
from launch.gateway.registry.node import Node
from launch.gateway.registry.refusals import (
    refuse_living,
    refuse_taken,
    refuse_unlike,
    refuse_unreachable,
)
from launch.gateway.standby.leadership import PLANS_AHEAD
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)

FORGET_S = 300.0
"""A node whose lease ran out so long ago has left."""
_LETTERS = {Role.PREFILL: "p", Role.DECODE: "d", Role.READER: "r"}


class Registry:
    """Takes nodes in, and drains and forgets those that are silent."""

    def __init__(
        self,
        members: Membership,
        roster: Roster,
        orders: Orders,
        scheduler: Scheduler,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nodes: dict[str, Node] = {}
        """By name."""
        self.incarnations = Incarnations()
        self.counts = NodeCounts()
        self._members = members
        self._roster = roster
        self._orders = orders
        self._scheduler = scheduler
        self._now = now
        self._static = {peer.name for peer in members.peers()}

    # ---- what nodes ask ---------------------------------------------------------------

    def join(self, asked: JoinRequest) -> Joined:
        """Raises :class:`Conflict`."""
        name = asked.name or _free_name(asked, self.nodes, self._static)
        known = self.nodes.get(name)
        with self.counts.refusal():
            refuse_unlike(asked, self.nodes)
            refuse_unreachable(agent.endpoint for agent in self._members.agents.values())
            refuse_living(asked, known)
            refuse_taken(name, asked.members, self.nodes, self._static)
        self.incarnations.seen(asked.incarnation)
        if asked.plan:
            planned = PlanId(asked.plan + PLANS_AHEAD)
            self._scheduler.next_plan = max(self._scheduler.next_plan, planned)
        is_back = known is None or known.session == asked.session
        node = Node(
            name,
            asked.role,
            asked.session,
            lease=secrets.token_hex(16),
            renewed_s=self._now(),
            settings=asked.settings,
            group=asked.group.engine if asked.group is not None else "",
            rank=asked.group.rank if asked.group is not None else 0,
            size=asked.group.size if asked.group is not None else 1,
            turn=max(asked.turn, known.turn if known is not None else 0),
        )
        if known is not None:
            node.members = known.members
        self.nodes[name] = node
        if is_back and asked.incarnation:
            self.incarnations.keep(node, Incarnation(asked.incarnation))
        else:
            self.incarnations.begin(node)
        self._update(node, asked.members, asked.state)
        self.counts.changed(node, Change.JOINED)
        log.info("node joined node=%s role=%s names=%s", name, asked.role.value, node.names)
        agents = {name: agent.endpoint for name, agent in self._members.agents.items()}
        return Joined(
            name, node.lease, node.incarnation, node.turn, agents, list(self._members.engines)
        )

    def renew(self, asked: Renewal) -> Renewed:
        """Raises :class:`NotFound` for a lease that is unknown."""
        node = self._of_lease(asked.lease)
        with self.counts.refusal():
            refuse_taken(node.name, asked.members, self.nodes, self._static)
        self.incarnations.renewed(node, asked.incarnation)
        node.renewed_s, node.is_gone = self._now(), False
        self._update(node, asked.members, asked.state)
        idle, open_plans = self._is_idle(node)
        return Renewed(idle, open_plans, self._scheduler.next_plan, node.incarnation)

    def restart(self, asked: RestartRequest) -> Restarted:
        """Raises :class:`NotFound` for a lease that is unknown."""
        node = self._of_lease(asked.lease)
        self.incarnations.restart(node, asked.ended)
        return Restarted(node.incarnation, node.turn)

    def leave(self, asked: LeaveRequest) -> Left:
        node = next((n for n in self.nodes.values() if n.lease == asked.lease), None)
        if node is not None:
            self.counts.changed(node, Change.LEFT)
            self.forget(node)
        return Left()

    # ---- what operators ask -----------------------------------------------------------

    def take(self, name: str, role: Role, members: NodeMembers) -> None:
        """A node that an operator vouches for; raises :class:`Conflict`."""
        refuse_taken(name, members, self.nodes, self._static)
        if name in self.nodes:
            raise Conflict(f"There is a node {name} already.", Conflict.Reason.NAME)
        node = Node(name, role, session="", lease="", renewed_s=self._now(), has_lease=False)
        self.nodes[name] = node
        self._update(node, members, State.SERVING)

    def let_go(self, engine: str) -> bool:
        """Drain the node that an operator has added with this engine, and forget it once nothing
        is under way there; False: there is none."""
        for node in self.nodes.values():
            if engine in node.names and not node.has_lease:
                self._update(node, node.members, State.DRAINING)
                return True
        return False

    # ---- time -------------------------------------------------------------------------

    def sweep(self) -> None:
        """Drain and forget the silent; call it once a second or so."""
        for node in list(self.nodes.values()):
            silent_s = node.silent_s(self._now())
            if silent_s > EXPIRY_S and not node.is_gone:
                log.warning("lease ran out node=%s silent_s=%.1f", node.name, silent_s)
                node.is_gone = True
                self.counts.changed(node, Change.EXPIRED)
                self.incarnations.lost(node)
                self._hold(node)
            if silent_s > FORGET_S or (node.is_let_go and self._is_idle(node)[0]):
                self.counts.changed(node, Change.FORGOTTEN)
                self.forget(node)

    def forget(self, node: Node) -> None:
        """It has left."""
        log.info("node left node=%s names=%s", node.name, node.names)
        del self.nodes[node.name]
        self._drop(node.names)
        others = self._hosts(node) if node.group else []
        if others:  # their ranks wait for those that come in its place
            self.incarnations.lost(node)
            self._hold(others[0])
        else:
            self.incarnations.forget(node.group)

    def mirror(self, nodes: list[Node]) -> None:
        """Know the same as another gateway, with leases that have just been renewed."""
        names = {node.name for node in nodes}
        for gone in [node for node in self.nodes.values() if node.name not in names]:
            self.forget(gone)
        for node in nodes:
            before = self.nodes.get(node.name)
            self.nodes[node.name] = node
            members, node.members = node.members, before.members if before else NodeMembers()
            node.renewed_s = self._now()
            self._update(node, members, node.state)

    # ---- inside -----------------------------------------------------------------------

    def _is_idle(self, node: Node) -> tuple[bool, int]:
        """And how many plans are open that name it, or its engine on whatever host."""
        engines = (engine.name for host in self._hosts(node) for engine in host.engines)
        names = {*engines, *(agent.name for agent in node.agents)}
        open_plans = self._scheduler.open.naming(names)
        return not open_plans and is_idle(self._members, names), open_plans

    def _of_lease(self, lease: str) -> Node:
        for node in self.nodes.values():
            if node.lease == lease:
                return node
        raise NotFound("This lease is unknown here: join again.")

    def _update(self, node: Node, members: NodeMembers, state: State) -> None:
        before = node.names
        node.members, node.state = members, state
        self._drop([name for name in before if name not in node.names])
        self._roster.add(node.agents, node.engines)
        self._hold(node)

    def _hosts(self, node: Node) -> list[Node]:
        """Those of its engine that are there; of one host, the node itself."""
        if not node.group:
            return [node]
        return [other for other in self.nodes.values() if other.group == node.group]

    def _hold(self, node: Node) -> None:
        """An engine over several hosts serves while all of them do; each host's agent by itself."""
        hosts, missed = self._hosts(node), self._members.missed
        is_whole = len(hosts) == node.size and not any(h.gets_nothing_new for h in hosts)
        may_come_back = not is_whole and all(h.state is State.SERVING for h in hosts)
        for engine in (engine.name for host in hosts for engine in host.engines):
            self._orders.hold(engine, not is_whole)
            (missed.add if may_come_back else missed.discard)(engine)
        for agent in (agent.name for agent in node.agents):
            self._orders.hold(agent, node.gets_nothing_new)

    def _drop(self, names: list[str]) -> None:
        self._roster.remove(names)
        for name in names:
            self._orders.forget(name)


def _free_name(asked: JoinRequest, nodes: Mapping[str, Node], static: Set[str]) -> str:
    letter = _LETTERS[asked.role]
    of_session = [node.name for node in nodes.values() if node.session == asked.session]
    if of_session:
        return of_session[0]
    number = 0
    while (name := f"{letter}{number}") in nodes or not static.isdisjoint((name, f"agent-{name}")):
        number += 1
    return name
