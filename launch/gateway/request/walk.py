"""The walk of one prompt: attempts until one is answered, or there is no use in another.

A walk is a task of its own, whose answer is taken from its ``answer``. What is tried again:

* A failure that the engines live through (a load that failed, an error of theirs), once.
* A plan that an update of weights has overtaken, a few times: nothing has been done yet.
* The loss of an engine that somebody else is to blame for, for as long as the request may last.
* The loss of an engine that this request may have caused (``suspects``), once, where no other
  suspect begins at the same time. If an engine is lost again, it is not sent a third time, nor,
  if it was alone, for a while whenever its client sends it again.
* One that has ended an engine is refused at once.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace

from launch.gateway.admission import Seat
from launch.gateway.errors import (
    Aborted,
    AttemptFailed,
    BadRequest,
    GatewayError,
    PlanStale,
    Poisoned,
    RequestFailed,
)
from launch.gateway.request.aborted import answer_aborted
from launch.gateway.request.answer import Answer
from launch.gateway.request.attempt import Asked, Attempt, Way
from launch.gateway.request.parts import OF_EVENTS, Part
from launch.gateway.request.suspects import Fingerprint, Guilt
from launch.gateway.request.trace import Trace
from launch.gateway.services import Services

log = logging.getLogger(__name__)

FAILURES_MAX = 2
"""Attempts that may fail while the engines live on, by a load that failed or an engine's error."""
STALE_PLANS_MAX = 8
"""Updates of weights that one request may meet; each new plan waits for engines of one version."""
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
        named_events = part.path in OF_EVENTS
        self.answer = Answer(part.stream, services.config.client_stall_s, named_events)
        self.seat = seat
        self.outcome = "client_gone"
        """What ``requests_total`` counts it as, once it is over."""
        self._services = services
        self._tokenized = tokenized
        self._begun_s = begun_s
        self._fingerprint = Fingerprint(part, seat.tenant)
        self._asked = Asked(
            services, part, seat, begun_s, self.answer, self.trace, self._fingerprint
        )
        self._way = Way(use_cache)
        self._attempt: Attempt | None = None
        self._is_paused = False
        """Its attempt is ended for an update of weights."""
        self._failures = 0
        self._stale_plans = 0
        self.task = asyncio.create_task(self._run())

    def cancel(self) -> None:
        """The client is gone."""
        self.task.cancel()

    def fail(self, error: GatewayError) -> None:
        """End it, with this for the client."""
        self.task.cancel()
        self.answer.close(error)

    async def abort(self) -> None:
        """``/abort_request``: the engines end the answer, if they have the request yet."""
        self.answer.aborted = True
        if self._attempt is not None and self._attempt.posted:
            await self._attempt.abort()
            self._services.in_background(self._end_unanswered())
        elif not self.answer.opened:
            await self._end_aborted()

    async def _end_unanswered(self) -> None:
        """An engine that was told of the abort before it got the request ends nothing."""
        await asyncio.wait({self.task}, timeout=ABORT_GRACE_S)
        if not self.answer.opened:
            await self._end_aborted()

    async def _end_aborted(self) -> None:
        self.task.cancel()
        error: GatewayError | None = None
        try:
            await self._answer_aborted()
        except BadRequest as refusal:
            error = refusal
        self.answer.close(error)

    async def _answer_aborted(self) -> None:
        version = self._services.weights.view()["version"]
        await answer_aborted(self.answer, self.part, version)

    @property
    def is_at_engines(self) -> bool:
        """They have it."""
        attempt = self._attempt
        return attempt is not None and bool(attempt.posted) and not attempt.is_over

    @property
    def is_prefilled(self) -> bool:
        """It decodes: P's own answer may come later than D's first token."""
        exchange = self._attempt.exchange if self._attempt is not None else None
        return self.answer.opened or (exchange is not None and exchange.prefilled)

    async def pause(self) -> None:
        """Weights are to be updated: what has tokens ends with them, what has none begins again
        afterwards."""
        if self._attempt is not None and self.is_at_engines:
            self._is_paused = not self.answer.aborted
            await self._attempt.abort()

    # ---- the whole walk ---------------------------------------------------------------

    async def _run(self) -> None:
        outcome = self.outcome
        error: GatewayError | None = None
        try:
            if self._tokenized is not None:
                await asyncio.shield(self._tokenized)  # other parts wait for it too
                self.trace.clock("tokenize", self._begun_s)
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
        engine_rid = self._attempt.rid if self._attempt is not None else ""
        page_tokens = self._attempt.page_tokens if self._attempt is not None else 0
        self.outcome = outcome
        self.trace.clock("total", self._begun_s)
        self._services.metrics.requests.labels(self.part.path, outcome).inc()
        if outcome == "ok":
            first_token_s = self.answer.first_token_s - self._begun_s
            self._services.metrics.served(self.trace, page_tokens, first_token_s)
        log.info(
            "request rid=%s engine_rid=%s path=%s outcome=%s prompt_tokens=%d attempts=%d "
            "total_s=%.3f",
            self.part.rid,
            engine_rid,
            self.part.path,
            outcome,
            len(self.part.token_ids or ()),
            self.trace.attempts,
            self.trace.timings_s["total"],
        )
        self.trace.log(self.part.rid, outcome)
        hit_tokens = self.trace.hit_blocks * page_tokens
        self._services.recent.note(self.part, self.trace, hit_tokens, outcome)

    async def _serve(self) -> None:
        known = self._services.suspects.fingerprints
        if known.suspected(self._fingerprint):
            self._way = replace(self._way, alone=True)
        while True:
            self._attempt = Attempt(self._asked, self._way)
            self._is_paused = False
            try:
                await self._attempt.run()
                break
            except AttemptFailed as failure:
                if await self._was_ended(failure, self._attempt):
                    break
                if not self._begins_again(self._attempt):
                    self._go_on(failure, self._attempt)
            self._services.metrics.retries.inc()
            known.suspected(self._fingerprint)  # it may have been found out meanwhile
        if self._way.alone:
            known.acquit(self._fingerprint)

    async def _was_ended(self, failure: AttemptFailed, attempt: Attempt) -> bool:
        """By an order, before it had a token: then that is its answer."""
        is_by_order = isinstance(failure, Aborted) or self.answer.aborted
        if self.answer.opened or not is_by_order or attempt.guilt or self._is_paused:
            return False
        await self._answer_aborted()
        return True

    def _begins_again(self, attempt: Attempt) -> bool:
        """Behind the gate: it was ended for an update of weights, before it had a token."""
        return self._is_paused and not self.answer.opened and attempt.guilt is None

    def _go_on(self, failure: AttemptFailed, attempt: Attempt) -> None:
        """Return if there is to be one more attempt; else raise what the client is told."""
        guilt, known = attempt.guilt, self._services.suspects.fingerprints
        log.warning("attempt failed rid=%s guilt=%s reason=%s", self.part.rid, guilt, failure)
        if guilt is Guilt.POISON:
            known.note(self._fingerprint, refused=True)
            raise Poisoned("This request ends the engine that computes it.") from failure
        if guilt is Guilt.SUSPECT:
            known.note(self._fingerprint, refused=False)
        if self.answer.opened or self.answer.aborted:
            raise RequestFailed(f"failed while answering: {failure}") from failure
        is_stale = guilt is None and isinstance(failure, PlanStale)
        if is_stale and self._stale_plans < STALE_PLANS_MAX:
            self._stale_plans += 1
            return
        self._failures += guilt is None
        if self._failures == FAILURES_MAX or (guilt is Guilt.SUSPECT and self._way.alone):
            raise RequestFailed(f"failed twice: {failure}") from failure
        self._way = Way(
            use_cache=self._way.use_cache and guilt is Guilt.BYSTANDER,
            avoided=self._way.avoided | attempt.engines,
            alone=self._way.alone or guilt is Guilt.SUSPECT,
        )
