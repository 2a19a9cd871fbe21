"""One try at a prompt: plan, read, hand over, compute.

Every wait inside is by the request's timeout, by the death of an engine it depends on, or by
cancelling the walk, and each of these cleans up at engines and readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from common.ids import Incarnation
from common.tracing.spans import OK, Span
from launch.gateway.admission import Seat
from launch.gateway.errors import (
    FAULTS,
    AttemptFailed,
    GatewayError,
    PlanStale,
    RequestTimeout,
    Unavailable,
)
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.request.answer import Answer
from launch.gateway.request.cancel_scope import CancelScope
from launch.gateway.request.exchange import Exchange, drain
from launch.gateway.request.parts import Part
from launch.gateway.request.prompt import hit_candidates
from launch.gateway.request.suspects import Fingerprint, Guilt, Slot
from launch.gateway.request.trace import Trace
from launch.gateway.services import Services
from scheduler.plan import NoEngine, Plan, PlanRequest

ROOM_BITS = 62
RID_BYTES = 16
FIRST_STEPS_S = 1.0
"""A suspect has begun so long after P's answer: D has decoded some of it by then."""


@dataclass(frozen=True)
class Asked:
    """What outlasts an attempt: what was asked, and what is to be answered."""

    services: Services
    part: Part
    seat: Seat
    begun_s: float
    answer: Answer
    trace: Trace
    fingerprint: Fingerprint

    def left_s(self) -> float:
        limit_s = self.services.config.request_timeout_s
        return max(0.0, self.begun_s + limit_s - time.monotonic())

    def scope(self) -> CancelScope:
        """A block that ends with the request's time."""
        limit_s = self.services.config.request_timeout_s
        return CancelScope(self.left_s(), RequestTimeout(f"no answer within {limit_s:g} s"))


@dataclass(frozen=True)
class Way:
    """How an attempt goes about it."""

    use_cache: bool = True
    avoided: frozenset[str] = frozenset()
    """Engines of failed attempts, whose errors do not tell which one was at fault."""
    alone: bool = False
    """It is a suspect: no other begins beside it."""


class Attempt:
    """Of one part. After a failure, ``guilt`` says what it has to do with it."""

    def __init__(self, asked: Asked, way: Way) -> None:
        self.rid = secrets.token_hex(RID_BYTES)
        """At the engines: as long as all others, so that none takes one for another."""
        self.engines: frozenset[str] = frozenset()
        self.page_tokens = 0
        self.guilt: Guilt | None = None
        """None: the engines live on."""
        self.posted: list[EnginePeer] = []
        """Engines that have the request, as far as is known."""
        self._asked = asked
        self._way = way
        self._services = asked.services
        self._slot: Slot | None = None
        self.exchange: Exchange | None = None
        """From when it was planned on."""
        self.is_over = False
        self._closings = 0
        """Of the gate, when the plan was made."""
        self._incarnations: dict[str, Incarnation] = {}
        self._namespace_digest = b""
        self._span = asked.part.span.child("attempt")

    async def run(self) -> None:
        """Raises ``AttemptFailed``, and what the client is to be told."""
        self._asked.trace.attempts += 1
        with _ended(self._span):
            await self._run()

    async def _run(self) -> None:
        async with self._alone():
            plan = await self._plan()
            self._services.plane.plans.on_delivered[plan.id] = self._asked.trace.delivered
            self._services.suspects.aboard[self.rid] = self._asked.fingerprint
            finished = False
            try:
                await self._carry_out(plan)
                finished = True
            finally:
                self.is_over = True
                del self._services.suspects.aboard[self.rid]
                del self._services.plane.plans.on_delivered[plan.id]
                self._services.plane.end(plan)
                if not finished:
                    self._services.in_background(self.abort())

    async def abort(self) -> None:
        """At the engines that have it."""
        if self.posted:
            await self._services.client.abort(self.posted, {"rid": self.rid})

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        if not self._way.alone:
            yield
            return
        services = self._services
        async with self._asked.scope() as scope, contextlib.AsyncExitStack() as stack:
            slot = services.suspects.alone(self._asked.fingerprint)
            with services.outage.bounded(scope):  # where nobody can begin, nobody makes room
                self._slot = await stack.enter_async_context(slot)
            held = stack.pop_all()
        async with held:
            yield

    # ---- plan -------------------------------------------------------------------------

    async def _plan(self) -> Plan:
        part, trace, services = self._asked.part, self._asked.trace, self._services
        begun_s = time.monotonic()
        tokens = len(part.token_ids or ())
        try:
            async with self._asked.scope() as scope:
                with services.outage.bounded(scope):
                    while True:
                        turn = services.admission.turn(self._asked.seat, tokens, part.priority)
                        async with turn:
                            plan = await self._next_plan()
                        if plan is not None:
                            break
                        tokens = 0  # its turn is paid for
                        await services.plane.wait_change()
        finally:
            now = trace.clock("queue", begun_s)
            services.metrics.queue_time.observe(now - begun_s)
            self._span.note("queue", begun_s)
        self._span.set({"plan": plan.id, "prefill": plan.prefill, "decode": plan.decode})
        trace.planned(plan, services.scheduler.expected_first_token_s(plan.id))
        self.engines = frozenset((plan.prefill, plan.decode))
        peers = services.plane.members.engines
        self._incarnations = {name: peers[name].incarnation for name in self.engines}
        return plan

    async def _next_plan(self) -> Plan | None:
        """Waits for an engine, in the turn of all others; None: only for other suspects to begin,
        which is to hold up nobody else."""
        plane, outage = self._services.plane, self._services.outage
        gate = self._services.weights.gate
        while True:
            await gate.wait_open()
            self._closings = gate.closings
            try:
                plan = self._plan_now()
                outage.over()
                return plan
            except NoEngine as error:
                if error.transient:
                    outage.over()
                    await plane.wait_change()
                elif self._slot is not None and self._services.suspects.beginning:
                    return None
                elif plane.expected():
                    await outage.wait(str(error))
                else:
                    raise Unavailable(str(error)) from error

    def _plan_now(self) -> Plan:
        """Raises ``NoEngine``."""
        plane, part, way = self._services.plane, self._asked.part, self._way
        namespace = plane.members.namespace()
        if namespace is None:
            raise NoEngine("prefill and decode", "; ".join(plane.members.troubles()))
        self.page_tokens = namespace.layout.page_tokens
        self._namespace_digest = namespace.digest()
        suspects = self._services.suspects
        use_cache = way.use_cache and not part.no_load
        request = PlanRequest(
            rid=part.rid,
            engine_rid=self.rid,
            prompt_tokens=len(part.token_ids or ()),
            keys=hit_candidates(part, namespace) if use_cache else [],
            max_new_tokens=part.max_new_tokens,
            page_tokens=self.page_tokens,
            block_bytes=namespace.layout.block_bytes,
            excluded=plane.members.strangers()
            | (suspects.beginning.keys() if self._slot else set()),
            avoided=way.avoided,
            use_cache=use_cache,
            parts=namespace.parts,
        )
        plan = self._services.scheduler.plan(request, time.monotonic())
        if self._slot is not None:
            engines = plane.members.of_one_process((plan.prefill, plan.decode))
            self._slot.take(engines)
        return plan

    # ---- carry it out -----------------------------------------------------------------

    async def _carry_out(self, plan: Plan) -> None:
        services, asked = self._services, self._asked
        exchange = Exchange(services.client, asked.part, asked.answer, asked.trace, self._span)
        self.exchange = exchange
        try:
            async with asked.scope() as scope:
                with self._watched(plan, scope, exchange):
                    plan = await self._bring(plan)
                    await self._hand_over(plan)
                    await self._compute(plan, scope, exchange)
        except AttemptFailed:
            self.guilt = await self._find_guilt(exchange)
            raise

    @contextlib.contextmanager
    def _watched(self, plan: Plan, scope: CancelScope, exchange: Exchange) -> Iterator[None]:
        """End ``scope`` when an engine dies whose work is still needed."""

        def prefill_died(reason: str) -> None:
            if not exchange.prefilled and not self._asked.answer.opened:
                scope.cancel(AttemptFailed(reason))

        def decode_died(reason: str) -> None:
            scope.cancel(AttemptFailed(reason))

        engines = self._services.plane.members.engines
        watches = ((engines[plan.prefill], prefill_died), (engines[plan.decode], decode_died))
        for engine, watcher in watches:
            engine.watchers.add(watcher)
        try:
            yield
        finally:
            for engine, watcher in watches:
                engine.watchers.discard(watcher)

    async def _bring(self, plan: Plan) -> Plan:
        """Have the hit in DRAM; returns the plan cut at the first block that is not."""
        begun_s = time.monotonic()
        plans, scheduler = self._services.plane.plans, self._services.scheduler
        part, trace = self._asked.part, self._asked.trace
        shares = await plans.read_shares(plan, self._span.traceparent)
        now = trace.clock("read", begun_s)
        hit_blocks = len(plan.keys)
        for agent, share in shares.items():
            in_dram = share.in_dram if share is not None else []
            hit_blocks = scheduler.share_settled(plan.id, agent, in_dram, now)
        cut = plan.cut(hit_blocks)
        plans.release(plan.id, [agent for agent, keys in cut.shares().items() if not keys])
        trace.read(cut, shares, len(part.token_ids or ()), self.page_tokens)
        hit = {"planned_blocks": len(plan.keys), "hit_blocks": len(cut.keys)}
        self._span.note("read", begun_s, hit)
        return cut

    async def _hand_over(self, plan: Plan) -> None:
        begun_s = time.monotonic()
        await self._services.plane.plans.place(
            plan, self._namespace_digest, self._asked.part.no_store
        )
        self._asked.trace.clock("plan", begun_s)
        self._span.note("hand over", begun_s)

    async def _compute(self, plan: Plan, scope: CancelScope, exchange: Exchange) -> None:
        engines = self._services.plane.members.engines
        prefill, decode = engines[plan.prefill], engines[plan.decode]
        body = self._asked.part.engine_body() | {
            "rid": self.rid,
            "request_id": self.rid,  # the same, to /v1/responses
            "bootstrap_host": prefill.address.bootstrap_host,
            "bootstrap_port": prefill.known().bootstrap_port,
            "bootstrap_room": secrets.randbits(ROOM_BITS),
        }
        if prefill.address.group is not None:
            body["disagg_prefill_dp_rank"] = prefill.address.group
        if self._services.weights.gate.closings != self._closings:
            raise PlanStale("weights are being updated")
        now = time.monotonic()
        self._services.scheduler.submitted(plan.id, now)
        self.posted = [prefill, decode]
        if self._slot is not None:
            self._slot.begun = True
        exchange.on_prefilled = self._first_steps
        prefill_answer = await exchange.run((prefill, decode), body, scope, now)
        self._services.in_background(drain(prefill_answer))

    def _first_steps(self) -> None:
        if self._slot is not None:
            asyncio.get_running_loop().call_later(FIRST_STEPS_S, self._slot.release)

    # ---- after a failure --------------------------------------------------------------

    async def _find_guilt(self, exchange: Exchange) -> Guilt | None:
        """What this request has to do with it if an engine was lost."""
        peers = self._services.plane.members.engines
        lost = [n for n in self.engines if n not in peers or await self._lost(peers[n])]
        if not lost:
            return None
        suspects, fingerprint = self._services.suspects, self._asked.fingerprint
        verdicts = {
            suspects.guilt(engine.name, self._incarnations[engine.name], fingerprint)
            for engine in self.posted
            if engine.name in lost and not (exchange.prefilled and engine.address.role == "prefill")
        }
        return max(verdicts, key=lambda guilt: guilt.value, default=Guilt.BYSTANDER)

    async def _lost(self, engine: EnginePeer) -> bool:
        """Whether the engine of this attempt is gone, or says nothing."""
        plane = self._services.plane
        if plane.members.alive(engine) and await self._services.client.refuses(engine):
            plane.http_state(engine, alive=False)
        changed = engine.incarnation != self._incarnations[engine.name]
        return changed or not plane.members.alive(engine)


@contextlib.contextmanager
def _ended(span: Span) -> Iterator[None]:
    """An attempt's span ends with it."""
    outcome = "failed"
    try:
        yield
        outcome = OK
    except asyncio.CancelledError:
        outcome = "cancelled"
        raise
    except GatewayError as error:
        outcome = error.outcome
        raise
    finally:
        span.end(outcome, is_error=outcome in FAULTS)
