"""One call at all engines at once, and their answers as one of SGLang's."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

import aiohttp
import msgspec

from common.json import JsonObject
from launch.gateway.errors import Unavailable
from launch.gateway.peers.engine_client import Call, EngineClient, HttpAnswer
from launch.gateway.peers.membership import Membership
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.weights.bodies import check_tensors, ranks_of

CALL_S = 1800.0
"""Engines that join a group, or receive weights, wait for each other and for the trainer."""
OPEN_JOBS = "engine_open_jobs"
UPDATED = "Weights were updated"
"""Begins SGLang's refusal of an update that was made, but whose flush was not."""


class Outcome(msgspec.Struct):
    """What an engine made of a call."""

    answer: HttpAnswer | None
    """None: it died, or does not answer."""
    trouble: str = ""
    """Why it has not done it; empty if it has."""

    @property
    def is_done(self) -> bool:
        return self.answer is not None and not self.trouble

    @property
    def has_new_weights(self) -> bool:
        return self.is_done or self.trouble.startswith(UPDATED)


Outcomes = dict[str, Outcome]


class AllEngines:
    """Those that live now, one of each process: the attention groups of one have its weights."""

    def __init__(self, client: EngineClient, members: Membership) -> None:
        self.live = members.live_engines
        self._client = client

    def in_rank_order(self) -> list[EnginePeer]:
        """Prefill engines, then decode engines, each by name."""
        processes = [engine for engine in self.live() if not engine.address.group]
        return sorted(processes, key=lambda e: (e.address.role == "decode", e.name))

    async def at_all(self, path: str, body: JsonObject) -> HttpAnswer:
        """A call that writes no weights of the model's."""
        return merged(await self.at_each(self.in_rank_order(), Call("POST", path, body)))

    async def at_each(
        self, engines: Sequence[EnginePeer], call: Call, limit_s: float = CALL_S
    ) -> Outcomes:
        """The same call at each."""
        return await self.with_calls(
            engines, dict.fromkeys((e.name for e in engines), call), limit_s
        )

    async def with_calls(
        self, engines: Sequence[EnginePeer], calls: Mapping[str, Call], limit_s: float = CALL_S
    ) -> Outcomes:
        """``calls`` are by the engine's name."""
        outcomes = await asyncio.gather(*(self._call(e, calls[e.name], limit_s) for e in engines))
        return {engine.name: outcome for engine, outcome in zip(engines, outcomes, strict=True)}

    async def _call(self, engine: EnginePeer, asked: Call, limit_s: float) -> Outcome:
        call = asyncio.ensure_future(self._client.call(engine, asked, limit_s))
        reasons: list[str] = []

        def died(reason: str) -> None:
            reasons.append(reason)
            call.cancel()

        engine.watchers.add(died)
        try:
            answer = await call
            return Outcome(answer, "" if answer.status == 200 else _message(answer))
        except (aiohttp.ClientError, TimeoutError) as error:
            return Outcome(None, repr(error))
        except asyncio.CancelledError:
            if not reasons:
                raise
            return Outcome(None, reasons[0])
        finally:
            engine.watchers.discard(died)

    async def ranks(self, engines: Sequence[EnginePeer]) -> dict[str, int]:
        """Of each engine how many hold weights."""
        infos = await self.at_each(engines, Call("GET", "/server_info"))
        answer = merged(infos)
        if answer.status != 200:
            raise Unavailable(f"an engine's ranks are not known: {answer.body[:300]!r}")
        return {
            name: ranks_of(outcome.answer.body)
            for name, outcome in infos.items()
            if outcome.answer is not None
        }

    async def check_tensors(self, body: JsonObject) -> None:
        """Raises ``BadRequest`` for what engines could not open."""
        ranks = await self.ranks(self.in_rank_order())
        await asyncio.to_thread(check_tensors, body, max(ranks.values(), default=1))


def merged(outcomes: Outcomes, roles_left: Collection[str] = ()) -> HttpAnswer:
    """The first engine's answer, if all have done it. Otherwise who has not, and why: no error if
    they died, and both roles are among those left."""
    answers = [o.answer for o in outcomes.values() if o.answer is not None and o.is_done]
    lacking = {name: outcome for name, outcome in outcomes.items() if not outcome.is_done}
    if answers and not lacking:
        return answers[0]
    told = "; ".join(f"{name}: {outcome.trouble}" for name, outcome in lacking.items())
    statuses = [o.answer.status for o in lacking.values() if o.answer is not None]
    if not statuses and len(roles_left) == 2:
        message = f"Succeeded; engines that died get no requests until they are updated ({told})."
        return as_json(200, {"success": True, "message": message})
    status = max(statuses, default=503)
    return as_json(status, {"success": False, "message": told or "no engine is alive"})


def open_jobs(engine: EnginePeer) -> float:
    """How many transfers of its KV an engine said are under way."""
    return sum(
        s.value
        for s in engine.samples()
        if s.metric == OPEN_JOBS and isinstance(s.value, float | int)
    )


def as_json(status: int, value: object) -> HttpAnswer:
    return HttpAnswer(status, "application/json", msgspec.json.encode(value))


def _message(answer: HttpAnswer) -> str:
    """In SGLang's shapes of errors."""
    text = answer.body[:1000].decode(errors="replace")
    try:
        fields = msgspec.json.decode(answer.body, type=dict[str, object])
    except (msgspec.DecodeError, msgspec.ValidationError):
        return text
    error = fields.get("error")
    inner = error.get("message") if isinstance(error, dict) else None
    return str(fields.get("message") or inner or text)
