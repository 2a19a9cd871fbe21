"""The walk of one prompt: plan, read, hand over, compute, answer; once more if that fails.

A walk is a task of its own, whose answer is taken from its ``answer``. Every wait inside is
by the request's timeout, by the death of an engine it depends on, or by cancelling
the walk, and each of these cleans up at engines and readers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator

from launch.gateway.admission import Seat
from launch.gateway.errors import (
    AttemptFailed,
    BadRequest,
    GatewayError,
    RequestFailed,
    RequestTimeout,
    Unavailable,
)
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.request.answer import Answer
from launch.gateway.request.cancel_scope import CancelScope
from launch.gateway.request.exchange import Exchange, drain
from launch.gateway.request.parts import Part
from launch.gateway.request.prompt import hit_candidates
from launch.gateway.request.trace import Trace
from launch.gateway.services import Services
from scheduler.plan import NoEngine, Plan, PlanRequest

log = logging.getLogger(__name__)

ROOM_BITS = 62
ENGINE_RID_BYTES = 16
ABORT_GRACE_S = 5.0
"""An aborted request that an engine has not begun to answer by then is given up here."""


class RequestWalk:
    """Serves one :class:`Part`. Create it inside the running loop."""

    def __init__(
        self,
        services: Services,
        part: Part,
        seat: Seat,
        begun_s: float,
        tokenized: asyncio.Future[None] | None = None,
        use_cache: bool = True,
    ) -> None:
        """``tokenized``: what fills in the part's ``token_ids``, unless they are there."""
        self.part = part
        self.trace = Trace()
        self.answer = Answer(part.stream, services.config.client_stall_s)
        self._services = services
        self.seat = seat
        self._tokenized = tokenized
        self._use_cache = use_cache
        self._begun_s = begun_s
        self._engine_rid = ""
        """Of this attempt: as long as all others, so that no engine takes one for another."""
        self._posted: list[EnginePeer] = []
        self._tried: frozenset[str] = frozenset()
        """Engines of the failed attempt. Its error does not tell which one was at fault."""
        self._page_tokens = 0
        self._namespace_digest = b""
        self.task = asyncio.create_task(self._run())

    def cancel(self) -> None:
        """The client is gone."""
        self.task.cancel()

    async def abort(self) -> None:
        """``/abort_request``: the engines end the answer, if they have the request yet."""
        self.answer.aborted = True
        if self._posted:
            await self._services.client.abort(self._posted, {"rid": self._engine_rid})
            self._services.in_background(self._end_unanswered())
        elif not self.answer.opened:
            self.task.cancel()
            self.answer.close(BadRequest("the request was aborted before it started"))

    async def _end_unanswered(self) -> None:
        """An engine that was told of the abort before it got the request ends nothing."""
        await asyncio.wait({self.task}, timeout=ABORT_GRACE_S)
        if not self.answer.opened:
            self.task.cancel()
            self.answer.close(BadRequest("the request was aborted"))

    # ---- the whole walk ---------------------------------------------------------------

    async def _run(self) -> None:
        outcome = "client_gone"
        error: GatewayError | None = None
        try:
            await self._serve()
            outcome = "ok"
        except GatewayError as ending:
            outcome, error = ending.outcome, ending
        except Exception:
            # A bug of the gateway: the plan was ended and the engines told, as after any failure.
            log.exception("walk failed rid=%s", self.part.rid)
            outcome, error = "failed", RequestFailed("internal error of the gateway")
        finally:
            self._account(outcome)
        self.answer.close(error)

    def _account(self, outcome: str) -> None:
        self.trace.clock("total", self._begun_s)
        self._services.metrics.requests.labels(self.part.path, outcome).inc()
        if outcome == "ok":
            first_token_s = self.answer.first_token_s - self._begun_s
            self._services.metrics.served(self.trace, self._page_tokens, first_token_s)
        log.info(
            "request rid=%s engine_rid=%s path=%s outcome=%s prompt_tokens=%d attempts=%d "
            "total_s=%.3f",
            self.part.rid,
            self._engine_rid,
            self.part.path,
            outcome,
            len(self.part.token_ids or ()),
            self.trace.attempts,
            self.trace.timings_s["total"],
        )
        self.trace.log(self.part.rid, outcome)
        hit_tokens = self.trace.hit_blocks * self._page_tokens
        self._services.recent.note(self.part, self.trace, hit_tokens, outcome)

    async def _serve(self) -> None:
        if self._tokenized is not None:
            await asyncio.shield(self._tokenized)  # other parts wait for it too
            self.trace.clock("tokenize", self._begun_s)
        try:
            await self._attempt(frozenset(), self._use_cache)
            return
        except AttemptFailed as failure:
            if self.answer.opened or self.answer.aborted:
                raise RequestFailed(f"failed while answering: {failure}") from failure
            log.warning("retrying rid=%s reason=%s", self.part.rid, failure)
            dead = failure.dead
        self._services.metrics.retries.inc()
        try:
            await self._attempt(dead, use_cache=False)
        except AttemptFailed as failure:
            raise RequestFailed(f"failed twice: {failure}") from failure

    async def _attempt(self, dead: frozenset[str], use_cache: bool) -> None:
        self.trace.attempts += 1
        self._engine_rid = secrets.token_hex(ENGINE_RID_BYTES)
        plan = await self._plan(dead, use_cache)
        self._tried = frozenset((plan.prefill, plan.decode))
        exchange = Exchange(self._services.client, self.part, self.answer, self.trace)
        finished = False
        self._services.plane.plans.on_delivered[plan.id] = self.trace.delivered
        try:
            async with CancelScope(self._left_s(), self._timeout()) as scope:
                with self._watched(plan, scope, exchange):
                    plan = await self._bring(plan)
                    await self._hand_over(plan)
                    await self._compute(plan, scope, exchange)
            finished = True
        finally:
            del self._services.plane.plans.on_delivered[plan.id]
            self._services.plane.end(plan)
            if self._posted and not finished:
                abort = self._services.client.abort(self._posted, {"rid": self._engine_rid})
                self._services.in_background(abort)
            self._posted = []

    def _left_s(self) -> float:
        limit_s = self._services.config.request_timeout_s
        return max(0.0, self._begun_s + limit_s - time.monotonic())

    def _timeout(self) -> RequestTimeout:
        return RequestTimeout(f"no answer within {self._services.config.request_timeout_s:g} s")

    # ---- plan -------------------------------------------------------------------------

    async def _plan(self, dead: frozenset[str], use_cache: bool) -> Plan:
        begun_s = time.monotonic()
        tokens = len(self.part.token_ids or ())
        turn = self._services.admission.turn(self.seat, tokens, self.part.priority)
        try:
            async with asyncio.timeout(self._left_s()), turn:
                plan = await self._next_plan(dead, use_cache)
        except TimeoutError as error:
            raise self._timeout() from error
        finally:
            now = self.trace.clock("queue", begun_s)
            self._services.metrics.queue_time.observe(now - begun_s)
        self.trace.planned(plan, self._services.scheduler.expected_first_token_s(plan.id))
        return plan

    async def _next_plan(self, dead: frozenset[str], use_cache: bool) -> Plan:
        plane = self._services.plane
        while True:
            namespace = plane.members.namespace()
            if namespace is None:
                raise Unavailable("; ".join(plane.members.troubles()) or "no engine is ready")
            self._page_tokens = namespace.layout.page_tokens
            self._namespace_digest = namespace.digest()
            request = PlanRequest(
                rid=self.part.rid,
                prompt_tokens=len(self.part.token_ids or ()),
                keys=hit_candidates(self.part, namespace) if use_cache else [],
                max_new_tokens=self.part.max_new_tokens,
                page_tokens=self._page_tokens,
                block_bytes=namespace.layout.block_bytes,
                excluded=dead | plane.members.strangers(),
                avoided=self._tried,
                use_cache=use_cache,
                engine_rid=self._engine_rid,
            )
            try:
                return self._services.scheduler.plan(request, time.monotonic())
            except NoEngine as error:
                if not error.transient:
                    raise Unavailable(str(error)) from error
            await plane.wait_change()

    @contextlib.contextmanager
    def _watched(self, plan: Plan, scope: CancelScope, exchange: Exchange) -> Iterator[None]:
        """End ``scope`` when an engine dies whose work is still needed."""

        def prefill_died(reason: str) -> None:
            if not exchange.prefilled and not self.answer.opened:
                scope.cancel(AttemptFailed(reason, frozenset([plan.prefill])))

        def decode_died(reason: str) -> None:
            scope.cancel(AttemptFailed(reason, frozenset([plan.decode])))

        engines = self._services.plane.members.engines
        watches = ((engines[plan.prefill], prefill_died), (engines[plan.decode], decode_died))
        for engine, watcher in watches:
            engine.watchers.add(watcher)
        try:
            yield
        finally:
            for engine, watcher in watches:
                engine.watchers.discard(watcher)

    # ---- read and hand over -----------------------------------------------------------

    async def _bring(self, plan: Plan) -> Plan:
        """Have the hit in DRAM; returns the plan cut at the first block that is not."""
        begun_s = time.monotonic()
        plans, scheduler = self._services.plane.plans, self._services.scheduler
        shares = await plans.read_shares(plan)
        now = self.trace.clock("read", begun_s)
        hit_blocks = len(plan.keys)
        for agent, share in shares.items():
            in_dram = share.in_dram if share is not None else []
            hit_blocks = scheduler.share_settled(plan.id, agent, in_dram, now)
        cut = plan.cut(hit_blocks)
        plans.release(plan.id, [agent for agent, keys in cut.shares().items() if not keys])
        self.trace.read(cut, shares, len(self.part.token_ids or ()), self._page_tokens)
        return cut

    async def _hand_over(self, plan: Plan) -> None:
        begun_s = time.monotonic()
        await self._services.plane.plans.place(plan, self._namespace_digest)
        self.trace.clock("plan", begun_s)

    async def _compute(self, plan: Plan, scope: CancelScope, exchange: Exchange) -> None:
        engines = self._services.plane.members.engines
        prefill, decode = engines[plan.prefill], engines[plan.decode]
        body = self.part.engine_body() | {
            "rid": self._engine_rid,
            "bootstrap_host": prefill.address.bootstrap_host,
            "bootstrap_port": prefill.known().bootstrap_port,
            "bootstrap_room": secrets.randbits(ROOM_BITS),
        }
        if prefill.address.group is not None:
            body["disagg_prefill_dp_rank"] = prefill.address.group
        now = time.monotonic()
        self._services.scheduler.submitted(plan.id, now)
        self._posted = [prefill, decode]
        prefill_answer = await exchange.run((prefill, decode), body, scope, now)
        self._services.in_background(drain(prefill_answer))
