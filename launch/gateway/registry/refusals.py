"""Why a node is not taken into the cluster, in sentences for whoever started it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from common.cluster.membership import SAME_PROTOCOL, JoinRequest, NodeMembers
from launch.gateway.errors import Conflict
from launch.gateway.registry.node import Node
from transfer.control.sockets import UNIX

TAKEN_RETRY_S = 2


def refuse_unlike(asked: JoinRequest, nodes: Mapping[str, Node]) -> None:
    """Raises :class:`Conflict` for settings that differ from another node's, or the gateway's."""
    living = {name: node for name, node in nodes.items() if not node.is_gone}
    others = {name: node.settings for name, node in living.items() if name != asked.name}
    for other, settings in {"the gateway": SAME_PROTOCOL, **others}.items():
        for setting in sorted(settings.keys() & asked.settings.keys()):
            here, theirs = settings[setting], asked.settings[setting]
            if here != theirs:
                who = asked.name or f"This {asked.role.value} node"
                raise Conflict(
                    f"{who} has {setting} {theirs}, but {other} has {here}: all nodes of a cluster "
                    "need the same.",
                    Conflict.Reason.SETTINGS,
                )


def refuse_living(asked: JoinRequest, known: Node | None) -> None:
    """Raises :class:`Conflict` where the node of that name is another one, and lives."""
    if known is not None and known.session != asked.session and not known.is_gone:
        raise Conflict(
            f"There is a node {known.name} already, and it lives.",
            Conflict.Reason.NAME,
            TAKEN_RETRY_S,
        )


def refuse_unreachable(endpoints: Iterable[str]) -> None:
    """Raises :class:`Conflict` where newcomers could not reach those that are there."""
    if any(endpoint.startswith(UNIX) for endpoint in endpoints):
        raise Conflict(
            "The first nodes of this cluster are on unix sockets of one host, where nobody else "
            "reaches them: start the gateway alone, and each node by launch.node.",
            Conflict.Reason.UNREACHABLE,
        )


def refuse_taken(
    name: str, members: NodeMembers, nodes: Mapping[str, Node], static: Set[str]
) -> None:
    """Raises :class:`Conflict` for a name that somebody else has, or one of the gateway's own
    configuration (``static``)."""
    agents = [members.agent.name] if members.agent is not None else []
    wanted = {*agents, *(engine.name for engine in members.engines)}
    others = {taken for n, node in nodes.items() if n != name for taken in node.names}
    taken = wanted & (others | static)
    if not static.isdisjoint((name, f"agent-{name}")):
        taken.add(name)
    if taken:
        names = ", ".join(sorted(taken))
        raise Conflict(f"Others are called {names} in this cluster already.", Conflict.Reason.NAME)
