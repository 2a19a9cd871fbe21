"""How a node joins a running cluster, stays in it and leaves: bodies of the gateway's routes.

JSON over HTTP, ``Authorization: Bearer`` with the join token, which is made of the cluster's secret
(:func:`transfer.control.keys.derived`). The gateway keeps no file of it: a node that it does not
know any more joins again, with all that it had.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from common.ids import Incarnation, PlanId
from common.messages.codec import PROTOCOL

JOIN = "/membership/join"
RENEW = "/membership/renew"
RESTART = "/membership/restart"
LEAVE = "/membership/leave"

TOKEN_PURPOSE = "join"
"""Of the token, for :func:`transfer.control.keys.derived`."""
RENEW_S = 3.0
EXPIRY_S = 10.0
"""After so long without a renewal a node's members get nothing new."""
SAME_PROTOCOL = {"protocol": PROTOCOL.decode()}
"""Of :attr:`JoinRequest.settings`: what the gateway itself has, too."""
ENGINES_MAX = 64
"""Attention groups of one node's engine."""

Name = Annotated[str, Meta(max_length=64, pattern="^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
"""Of a node, an engine or an agent: a part of file names, metric labels and addresses."""
Text = Annotated[str, Meta(min_length=1, max_length=1024)]
Number = Annotated[int, Meta(ge=0, lt=1 << 48)]
Token = Annotated[str, Meta(min_length=8, max_length=128)]


class Role(Enum):
    """What a node is for."""

    PREFILL = "prefill"
    DECODE = "decode"
    READER = "reader"
    """An agent alone: its storage NIC serves everyone."""


class State(Enum):
    """What a node wants, or has come to."""

    SERVING = "serving"
    DRAINING = "draining"
    """Nothing new; what runs there finishes."""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class EngineAddress(_Body, frozen=True):
    """Where an engine is reached, or an attention group of one."""

    name: str
    role: str
    """"prefill" or "decode"."""
    agent: str
    """The agent of the engine's node."""
    http: str
    """e.g. ``http://127.0.0.1:31011``."""
    control: str
    """zmq endpoint, such as ``run://p0``."""
    bootstrap_host: str
    group: int | None = None
    """Which attention group of its engine it is; None: its engine has one."""


class AgentAddress(_Body, frozen=True):
    """Where an agent is reached."""

    name: Name
    control: Text
    """zmq endpoint; ``tcp://HOST:PORT`` for who is elsewhere."""


class NodeMembers(_Body, frozen=True):
    """The processes of a node by the addresses that others reach them at, not those bound. They may
    be told before they run: until they answer they are not used."""

    agent: AgentAddress | None = None
    engines: Annotated[list[EngineAddress], Meta(max_length=ENGINES_MAX)] = []
    """One for each attention group; none of a reader, and of a host of a group that is not its
    first."""


class HostOfGroup(_Body, frozen=True):
    """This node is one of several hosts of one engine."""

    engine: Name
    """The same at all of them."""
    rank: Annotated[int, Meta(ge=0, lt=1024)]
    """SGLang's ``--node-rank``."""
    size: Annotated[int, Meta(ge=1, le=1024)]


class JoinRequest(_Body, frozen=True):
    """``POST /membership/join``, at the start, and again when a renewal finds the lease unknown:
    then with the name, the members and the numbers of before."""

    role: Role
    session: Token
    """Random, made at the start of the node's process: who joins again is known by it. Another one
    gets the name only when its lease has gone, or was given back."""
    name: Name | None = None
    """None: the first free one of the role (p0, d0, r0 ...)."""
    members: NodeMembers = NodeMembers()
    settings: dict[str, str] = {}
    """What has to be alike all over the cluster, by name and value as they are to be shown; a name
    that only some give is compared among those."""
    group: HostOfGroup | None = None
    state: State = State.SERVING
    incarnation: Number = 0
    """The greatest that a process of this node was given; 0: none was."""
    turn: Number = 0
    """The last :attr:`Joined.turn`; 0: none."""
    plan: Number = 0
    """The last :attr:`Renewed.plan`; 0: none."""


class Joined(_Body, frozen=True):
    """Its answer."""

    name: str
    lease: str
    """To be sent with all that follows."""
    incarnation: Incarnation
    """For the processes that the node starts now: greater than all that were ever given for their
    names, whatever the node's clock says. Of a group: the same at all its hosts."""
    turn: int
    """Which of its bootstrap ports a prefill engine is to take, counted on from start to start:
    take it modulo their number."""
    agents: dict[str, str]
    """Name -> control endpoint of all that are known now; changes reach engines by themselves."""
    engines: list[str]
    """Names of all that may register at agents now, likewise."""
    renew_s: float = RENEW_S
    expiry_s: float = EXPIRY_S


class Renewal(_Body, frozen=True):
    """``POST /membership/renew``, every :attr:`Joined.renew_s`, and at once at a change. 404: the
    lease is unknown (another gateway): join again."""

    lease: Token
    members: NodeMembers
    """All of it each time."""
    state: State
    incarnation: Number
    """The greatest that a process of this node was given."""


class Renewed(_Body, frozen=True):
    """Its answer."""

    idle: bool
    """No request and no plan is under way that needs the node's members, and its agent has nothing
    to read, to deliver, to pull or to write behind: one that drains may stop."""
    open_plans: int
    """Under way, of those that name its members."""
    plan: PlanId
    """The gateway's next plan number, to be told when joining again."""
    incarnation: Incarnation
    """Of a group: greater than the one that runs here once another host has asked for a restart,
    or is lost: end the rank and ask for a restart as well. Else the one of before."""


class RestartRequest(_Body, frozen=True):
    """``POST /membership/restart``: a process of this node has ended and is to be started again.
    All hosts of a group may ask: the first one that names the incarnation that runs gets a new one,
    and so do the others."""

    lease: Token
    ended: Number
    """Incarnation of the process that has ended."""


class Restarted(_Body, frozen=True):
    """Its answer."""

    incarnation: Incarnation
    turn: int


class LeaveRequest(_Body, frozen=True):
    """``POST /membership/leave``: the node's processes have ended. Its names are free at once. A
    lease that is unknown has been left."""

    lease: Token


class Left(_Body, frozen=True):
    """Its answer."""
