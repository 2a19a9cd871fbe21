"""One node as the registry knows it, and the hosts of an engine that spans several."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.cluster.membership import AgentAddress, EngineAddress, NodeMembers, Role, State
from common.ids import NO_INCARNATION, Incarnation


@dataclass(eq=False)
class Node:
    """Joined, by itself or by an operator."""

    name: str
    role: Role
    session: str
    lease: str
    renewed_s: float
    """On the gateway's monotonic clock."""
    has_lease: bool = True
    """It has to renew it; what an operator has added has none."""
    settings: dict[str, str] = field(default_factory=dict)
    members: NodeMembers = NodeMembers()
    state: State = State.SERVING
    incarnation: Incarnation = NO_INCARNATION
    turn: int = 0
    group: str = ""
    """The engine that it is a host of, with others."""
    rank: int = 0
    size: int = 1
    """Over how many hosts its engine is spread."""
    is_gone: bool = False
    """Its lease has run out."""

    @property
    def agents(self) -> list[AgentAddress]:
        return [self.members.agent] if self.members.agent is not None else []

    @property
    def engines(self) -> list[EngineAddress]:
        return self.members.engines

    @property
    def names(self) -> list[str]:
        """Of its processes, engines first."""
        return [one.name for one in self.engines] + [one.name for one in self.agents]

    @property
    def is_let_go(self) -> bool:
        """An operator had added it, and wants it no more."""
        return not self.has_lease and self.state is State.DRAINING

    def silent_s(self, now_s: float) -> float:
        """Since its last renewal; 0 of one that has no lease."""
        return now_s - self.renewed_s if self.has_lease else 0.0

    @property
    def condition(self) -> str:
        """In a word: serving, draining or gone."""
        return "gone" if self.is_gone else self.state.value

    @property
    def gets_nothing_new(self) -> bool:
        return self.is_gone or self.state is State.DRAINING


@dataclass(eq=False)
class HostsOfEngine:
    """All ranks of an engine over several hosts run as one incarnation."""

    incarnation: Incarnation
    turn: int
    started: set[int] = field(default_factory=set)
    """Hosts, by rank, that have been given it."""
