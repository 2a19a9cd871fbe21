"""One episode's endpoint: requests of an agent on their way to the gateway, and their turns.

What the job has set wins over what an agent asks for: how tokens are drawn is what a sample says
of itself, and the limits are the job's.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import aiohttp
import msgspec
from aiohttp import web

from common.json import JsonObject
from launch.gateway.peers.engine_client import sse_events
from launch.gateway.request.parts import RESPONSES
from launch.gateway.request.trace import HEADER
from launch.rollout.answers import Generation, read_bytes_of, spans_of
from launch.rollout.errors import EndpointGone, RequestFailed
from launch.rollout.input.rows import Sampling
from launch.rollout.recording.answers import Passing
from launch.rollout.recording.conversation import messages_of
from launch.rollout.recording.passing_client import PassingClient
from launch.rollout.recording.prompts import prompt_of
from launch.rollout.recording.turns import Asked, RecordedTurn, Turns
from launch.rollout.slots import Slots

_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""Fields by which routes bound an answer."""


class Refused(Exception):
    """A request that the job does not let through; the text says why."""


class Bounds(msgspec.Struct, frozen=True):
    """Of an episode: turns, and tokens of a prompt and its answer."""

    max_turns: int
    max_episode_tokens: int


class Recorder:
    """Of one episode. ``model``: the name of what is served."""

    def __init__(
        self, bounds: Bounds, client: PassingClient, slots: Slots, sampling: Sampling, model: str
    ) -> None:
        self.turns = Turns()
        self.limit = ""
        """The limit that a request was refused for."""
        self.on_answer: Callable[[int, Generation], None] = lambda *_: None
        """Called with the tokens that were sent, and the answer."""
        self.unrecorded = 0
        """Answers that came without a record of their tokens: they broke off, or were ended."""
        self.gone: asyncio.Future[EndpointGone] = asyncio.get_running_loop().create_future()
        """Set when the endpoint serves nobody any more."""
        self._bounds = bounds
        self._client = client
        self._slots = slots
        self._sampling = sampling
        self._model = model
        self._at_work: set[asyncio.Task[web.StreamResponse]] = set()

    async def close(self) -> None:
        """The episode is over: what is in flight is nobody's."""
        for task in self._at_work:
            task.cancel()
        await asyncio.gather(*self._at_work, return_exceptions=True)

    async def serve(self, path: str, request: web.Request) -> web.StreamResponse:
        """Answer one request of the agent's on the route ``path``."""
        task = asyncio.create_task(self._serve(path, request))
        self._at_work.add(task)
        task.add_done_callback(self._at_work.discard)
        try:
            await asyncio.wait({task})
            return task.result()
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            return refusal(503, "this episode has ended")
        except (Refused, TypeError, msgspec.DecodeError) as error:
            return refusal(400, str(error))
        except EndpointGone as error:
            if not self.gone.done():
                self.gone.set_result(error)
            return refusal(503, str(error))
        except (RequestFailed, aiohttp.ClientError, TimeoutError) as error:
            return refusal(502, str(error) or repr(error))

    async def _serve(self, path: str, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=dict[str, object])
        body["model"] = self._model  # /v1/responses refuses others, and agents have names of theirs
        if body.get("n") not in (None, 1):
            raise Refused("n is 1 here: send a request for each answer")
        if self.turns.count + len(self._at_work) > self._bounds.max_turns:
            raise self._at("max_turns", f"this episode has had its {self._bounds.max_turns} turns")
        asked = self.turns.asked(path, body, messages_of(path, body))
        ids = await prompt_of(self._client, asked)
        room_tokens = self._bounds.max_episode_tokens - len(ids)
        if room_tokens < 1:
            raise self._at("max_episode_tokens", f"the prompt has {len(ids)} tokens")
        sent = self._as_the_job_says(path, body, room_tokens)
        sent |= {"input_ids": ids, "return_turn_record": True}
        with contextlib.closing(_Busy(self._slots)) as busy:
            await busy.begin()
            return await self._forward(asked, ids, sent, request)

    def _at(self, limit: str, text: str) -> Refused:
        self.limit = limit
        return Refused(f"{text} (--{limit.replace('_', '-')})")

    def _as_the_job_says(self, path: str, body: JsonObject, room_tokens: int) -> JsonObject:
        sampling = self._sampling
        most = min(sampling.max_new_tokens, room_tokens)
        asked = [n for name in _LIMITS if isinstance(n := body.get(name), int) and n > 0]
        sent = {name: value for name, value in body.items() if name not in _LIMITS}
        sent["max_output_tokens" if path == RESPONSES else "max_tokens"] = min([most, *asked])
        return sent | {"temperature": sampling.temperature, "top_p": sampling.top_p}

    # ---- the answer -------------------------------------------------------------------

    async def _forward(
        self, asked: Asked, ids: list[int], sent: JsonObject, request: web.Request
    ) -> web.StreamResponse:
        begun_s, passing = time.monotonic(), Passing(asked.path)
        name = f"{asked.path} {len(ids)} tokens"
        async with self._client.answering(asked.path, sent, name) as answer:
            if answer.status != 200:
                return _as_it_came(answer, await answer.read())
            finished = _Finished(self, asked, ids, answer.headers.get(HEADER, "{}"), begun_s)
            if not sent.get("stream"):
                data = passing.take_whole(await answer.read())
                finished.note(passing)
                return _as_it_came(answer, data)
            return await _relay(answer, request, passing, finished)


class _Finished:
    """What becomes of an answer, once all of it has come."""

    def __init__(
        self, recorder: Recorder, asked: Asked, ids: list[int], traced: str, begun_s: float
    ) -> None:
        self._recorder = recorder
        self._asked = asked
        self._ids = ids
        self._traced = traced
        self._begun_s = begun_s

    def note(self, passing: Passing) -> None:
        record, asked, recorder = passing.record, self._asked, self._recorder
        if record is None or record.prompt_tokens != len(self._ids):
            recorder.unrecorded += 1
            return
        said, tokens = passing.messages(), len(record.output_ids)
        answer = Generation(
            text="",
            token_ids=record.output_ids,
            logprobs=record.logprobs,
            finish_reason=record.finish_reason.type,
            stop=None,
            cached_tokens=record.cached_tokens,
            versions=spans_of(record.weight_versions, record.weight_version, tokens),
            read_bytes=read_bytes_of(self._traced),
            seconds=time.monotonic() - self._begun_s,
        )
        turn = RecordedTurn(
            [*asked.messages, *said], self._ids, answer, record.finish_reason.matched
        )
        recorder.turns.add(asked, turn, said)
        recorder.on_answer(len(self._ids), answer)


class _Busy:
    """A place in the job's slots, as long as a request is at the gateway."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._is_begun = False

    async def begin(self) -> None:
        await self._slots.take(begun=True)
        self._is_begun = True
        self._thinks(-1)

    def close(self) -> None:
        if self._is_begun:
            self._slots.give_back()
            self._thinks(1)

    def _thinks(self, change: int) -> None:
        self._slots.thinking += change
        self._slots.changed()


async def _relay(
    answer: aiohttp.ClientResponse, request: web.Request, passing: Passing, finished: _Finished
) -> web.StreamResponse:
    """Event by event. The last ones are held until the turn is noted: an agent that has read them
    may send the next request at once. It is read to its end also when the agent has gone."""
    response = web.StreamResponse(headers={"content-type": answer.content_type})
    await response.prepare(request)
    held: list[bytes] = []
    async for events in sse_events(answer.content):
        for event in events:
            passed = passing.take_event(event)
            if passing.record is not None:
                held.append(passed)
            else:
                await _send(response, passed)
    finished.note(passing)
    await _send(response, b"".join(held))
    with contextlib.suppress(ConnectionError):
        await response.write_eof()
    return response


async def _send(response: web.StreamResponse, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the agent has gone; its turn counts
        await response.write(data)


def _as_it_came(answer: aiohttp.ClientResponse, data: bytes) -> web.Response:
    return web.Response(status=answer.status, body=data, content_type=answer.content_type)


def refusal(status: int, text: str) -> web.Response:
    """In Anthropic's shape and OpenAI's at once, as the gateway's."""
    kind = "invalid_request_error" if status < 500 else "api_error"
    error = {"message": text, "type": kind, "param": None, "code": status}
    data = msgspec.json.encode({"type": "error", "error": error})
    return web.Response(status=status, body=data, content_type="application/json")
