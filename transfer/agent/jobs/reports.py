"""Who hears of jobs that have ended."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from common.ids import Incarnation
from common.messages.from_agents import Delivered, JobEnded, PullEnded
from transfer.agent.engines import Engine
from transfer.agent.metrics import AgentCounters


class Reports(msgspec.Struct, frozen=True):
    """What jobs of either kind need for that of the agent, whose ``incarnation`` it is."""

    incarnation: Incarnation
    counters: AgentCounters
    reply: Callable[[Engine, JobEnded | PullEnded], None]
    """To the engine whose job it was."""
    tell: Callable[[Delivered], None]
    """To whoever subscribes to the agent."""
