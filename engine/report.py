"""What an engine says of itself to the gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from common.ids import Incarnation
from common.loads import EngineLoad, ModelBounds
from common.messages.from_engines import EngineHello
from common.prefill_cost import PrefillCost
from common.samples import Sample, reported, sample
from engine.plans import Plans
from engine.sglang.requests import EngineRequests
from engine.sglang.views import Request
from engine.transfers.page_holds import PageHolds
from transfer.client import AgentLinks


class EngineIdentity(msgspec.Struct, frozen=True):
    """What does not change of an engine as long as its process lives."""

    name: str
    role: str
    """"prefill" or "decode"."""
    agent: str
    """The agent of its node."""
    group: str
    """Engines that are scheduled as one; its leader reports."""
    incarnation: Incarnation
    bootstrap_port: int
    """Of SGLang's bootstrap server; of a decode engine 0."""
    bounds: ModelBounds


class EngineReport:
    """Asked by the control port's thread, which takes no locks: the figures are approximate."""

    def __init__(
        self,
        identity: EngineIdentity,
        requests: EngineRequests,
        plans: Plans,
        holds: PageHolds,
        prefill_cost: Callable[[], PrefillCost | None],
        samples: Sequence[Callable[[], Iterable[Sample]]],
    ) -> None:
        """``samples``: of each part of the engine that has some."""
        self._identity = identity
        self._requests = requests
        self._plans = plans
        self._holds = holds
        self._prefill_cost = prefill_cost
        self._samples = samples

    def hello(self) -> EngineHello:
        """State of the engine now."""
        return EngineHello(
            load=self._load(),
            namespace=self._plans.weights.namespace,
            bootstrap_port=self._identity.bootstrap_port,
            bounds=self._identity.bounds,
            samples=reported(sample for part in self._samples for sample in part()),
            weights=self._plans.weights.state,
        )

    def _load(self) -> EngineLoad:
        me = self._identity
        running, waiting = self._requests.running(), self._requests.waiting()
        unfilled = waiting + self._requests.cut() if me.role == "prefill" else []
        return EngineLoad(
            engine=me.name,
            role=me.role,
            agent=me.agent,
            incarnation=me.incarnation,
            group=me.group,
            sequences=len(running) + len(waiting),
            pending_tokens=sum(map(self._pending_tokens, unfilled)),
            context_tokens=sum(
                len(request.origin_input_ids) + len(request.output_ids)
                for request in running + waiting
            ),
            free_tokens=self._holds.free_tokens + self._requests.evictable_tokens(),
            prefill_cost=self._prefill_cost(),
        )

    def _pending_tokens(self, request: Request) -> int:
        """Prompt tokens of a request that are neither computed nor to be loaded."""
        plan = self._plans.get(request.rid)
        loaded = len(plan.keys) * self._plans.page_tokens if plan is not None else 0
        return max(0, len(request.origin_input_ids) - max(loaded, request.prefix_len))


def with_links(hello: EngineHello, links: AgentLinks) -> EngineHello:
    """The same, with the agents that can deliver."""
    linked = links.linked()
    load = msgspec.structs.replace(hello.load, linked=linked)
    samples = [*hello.samples, sample("engine_linked_agents", len(linked))]
    return msgspec.structs.replace(hello, load=load, samples=samples, heard=links.heard)
