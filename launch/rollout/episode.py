"""One sample: turns of the model and answers of its environment, until it ends.

A turn whose answer says ``abort`` is not whole: it is continued by sending all tokens so far, whose
KV the store has, and the turn has one more segment. An episode that is cut short itself, since its
group needs it no more, keeps what it has for another job to go on with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from common.json import JsonObject
from launch.rollout.answers import Generation
from launch.rollout.client import Client
from launch.rollout.config import RolloutConfig
from launch.rollout.env import Done, Env, KnowsLateness, Reply, Say
from launch.rollout.errors import RequestFailed
from launch.rollout.input.rows import Prompt, Row
from launch.rollout.input.sampling import request_params, sampling_of
from launch.rollout.output.schema import ABORT, Sample, Segment, Turn, VersionSpan
from launch.rollout.slots import Slots
from launch.rollout.token_ids import CannotFollow, TokenIds, said_messages

if TYPE_CHECKING:
    from launch.rollout.recording.server import RecordingServer

AGAIN_S = 0.5
"""Before a turn is continued that was aborted without a new token."""
CUT_S = 30.0
"""For a request to answer once it was told to end."""


class EnvFailed(Exception):
    """The environment raised, took too long, or answered with something else."""


class EnvLate(EnvFailed):
    """It took too long."""


class Cut(Exception):
    """The episode was ended before it was whole, by :meth:`Episode.cut`."""


class Parts(msgspec.Struct):
    """What all episodes of a job share."""

    config: RolloutConfig
    client: Client
    token_ids: TokenIds
    slots: Slots
    build_env: Callable[[JsonObject], Env] | None
    fields_of: Callable[[int, Row], JsonObject]
    """The whole input row, for the environment."""
    on_answer: Callable[[int, Generation, bool], None] = lambda *_: None
    """Called with the tokens that were sent, the answer, and whether it continues a turn."""
    recording: RecordingServer | None = None
    """Of a job whose episodes are harnesses'."""


class Episode:
    """Sample ``number`` of a prompt."""

    def __init__(
        self, parts: Parts, prompt: Prompt, number: int, begun: Sample | None = None
    ) -> None:
        """``begun``: what an earlier job has of it."""
        self._parts = parts
        self._prompt = prompt
        self._env: Env | None = None
        self._holds_slot = True
        self._request = ""
        """The name of the request that is in flight."""
        self._running: asyncio.Task[str] | None = None
        self._is_cut = False
        self.sample = begun or _new_sample(parts.config, prompt, number)

    async def run(self) -> Sample:
        """Holds a slot when called, none when it ends, however; raises
        :class:`RequestFailed` and :class:`Cut`."""
        begun_s = time.monotonic()
        sample = self.sample
        self._running = asyncio.create_task(self._turns())
        try:
            sample.finish_reason = await self._running
        except EnvFailed as failure:
            sample.finish_reason, sample.error = "env_error", str(failure)
        except asyncio.CancelledError:
            if self._is_cut and not _is_cancelled():
                raise Cut from None
            raise
        finally:
            sample.seconds += time.monotonic() - begun_s
            self._give_back()
            await self._close_env()
        return sample

    async def cut(self, keep: bool) -> None:
        """End it now. With ``keep`` the tokens of the request in flight are waited for."""
        running, self._is_cut = self._running, True
        if running is None or running.done():
            return
        if keep and self._request and await self._parts.client.abort(self._request):
            await asyncio.wait({running}, timeout=CUT_S)
        running.cancel()

    @property
    def is_resumable(self) -> bool:
        """Whether another job can go on with what a cut one has: an environment is gone by then."""
        has_tokens = len(self.sample.token_ids) > self.sample.prompt_tokens
        return self._parts.build_env is None and has_tokens

    async def _turns(self) -> str:
        """Returns the finish reason."""
        sample, config = self.sample, self._parts.config
        self._env = await self._build_env()
        for number in range(config.max_turns):
            # Of a turn that an earlier job began, room was left for what it has generated.
            begun = sample.turns[number].begin if sample.turns[number:] else len(sample.token_ids)
            room_tokens = config.max_episode_tokens - begun
            if room_tokens < 1:
                if number:
                    return "max_episode_tokens"
                raise RequestFailed(f"the prompt alone has {len(sample.token_ids)} tokens")
            if not self._holds_slot:
                await self._parts.slots.take(begun=True)
                self._holds_slot = True
            reply = await self._turn(number, room_tokens)
            self._give_back()
            if self._env is None:
                return reply.finish_reason
            if self._is_cut:
                raise Cut
            said = await self._said(reply)
            if said is None:
                return "env_timeout"
            if isinstance(said, Done):
                sample.reward = said.reward
                return "done"
            if number + 1 < config.max_turns:
                await self._extend(said, reply)
        return "max_turns"

    def _give_back(self) -> None:
        if self._holds_slot:
            self._holds_slot = False
            self._parts.slots.give_back()

    # ---- one turn ---------------------------------------------------------------------

    async def _turn(self, number: int, room_tokens: int) -> Reply:
        """The model's whole answer."""
        sample = self.sample
        if number == len(sample.turns):
            sample.turns.append(_new_turn(len(sample.token_ids)))
        turn = sample.turns[number]
        limit_tokens = min(sample.sampling.max_new_tokens, room_tokens)
        answer, fruitful_s = None, time.monotonic()
        while turn.finish_reason == ABORT:
            left_tokens = limit_tokens - (turn.end - turn.begin)
            if left_tokens < 1:
                turn.finish_reason = "length"
                break
            answer = await self._generate(number, left_tokens)
            self._append(turn, answer)
            if turn.finish_reason == ABORT and self._is_cut:
                raise Cut
            if answer.token_ids:
                fruitful_s = time.monotonic()
            elif turn.finish_reason == ABORT:
                await _wait_after_abort(fruitful_s, self._parts.config.retry_s)
        text = await self._text(turn, answer)
        sample.messages.append({"role": "assistant", "content": text})
        tokens = turn.end - turn.begin
        logprobs = sample.logprobs[len(sample.logprobs) - tokens :] if sample.logprobs else []
        return Reply(number, text, sample.token_ids[turn.begin :], logprobs, turn.finish_reason)

    async def _generate(self, number: int, limit_tokens: int) -> Generation:
        sample, parts = self.sample, self._parts
        asked = sample.turns[number].attempts
        self._request = f"{sample.row}.{sample.sample}.{number}.{asked}"
        params = request_params(sample.sampling, limit_tokens)
        try:
            answer = await parts.client.generate(
                sample.token_ids, params, parts.config.logprobs, self._request
            )
        finally:
            self._request = ""
        continues = bool(sample.turns[number].segments)
        parts.on_answer(len(sample.token_ids), answer, continues)
        return answer

    def _append(self, turn: Turn, answer: Generation) -> None:
        """To the turn, and to the sample."""
        sample, begin = self.sample, len(self.sample.token_ids)
        sample.token_ids += answer.token_ids
        sample.logprobs += answer.logprobs
        for span in answer.versions:
            _add_span(sample, VersionSpan(span.version, begin + span.begin, begin + span.end))
        turn.finish_reason, turn.end = answer.finish_reason, len(sample.token_ids)
        turn.attempts += answer.attempts
        turn.read_bytes += answer.read_bytes
        turn.request_s += answer.seconds
        if answer.token_ids or answer.finish_reason != ABORT:
            if not turn.segments:
                turn.cached_tokens = answer.cached_tokens
                turn.weight_version = answer.versions[0].version if answer.versions else ""
            turn.segments.append(
                Segment(begin, turn.end, answer.cached_tokens, answer.finish_reason)
            )

    async def _text(self, turn: Turn, last: Generation | None) -> str:
        """Of one segment, the engine's. Several are decoded as one: a character may lie in two."""
        if last is not None and len(turn.segments) == 1:
            return last.text
        ids = self.sample.token_ids[turn.begin : turn.end]
        text = await self._parts.client.detokenize(ids, skip_special=True)
        stop = last.stop if last is not None else None
        return text[: text.rfind(stop)] if stop and stop in text else text

    # ---- environment ------------------------------------------------------------------

    async def _build_env(self) -> Env | None:
        build = self._parts.build_env
        if build is None:
            return None
        fields = self._parts.fields_of(self._prompt.number, self._prompt.row)
        try:
            return build(fields)
        except Exception as error:  # the user's code: this episode has no environment
            raise EnvFailed(_reason(error)) from error

    async def _said(self, reply: Reply) -> Say | Done | None:
        """The environment's answer to a turn, or what stands for one that is late; None where that
        ends the episode."""
        assert self._env is not None
        slots, begun_s = self._parts.slots, time.monotonic()
        slots.thinking += 1
        slots.changed()
        try:
            return await self._within_limit(self._env.reply(reply))
        except EnvLate:
            if self._parts.config.on_env_timeout == "fail":
                raise
            self.sample.turns[-1].env_timed_out = True
            if self._parts.config.on_env_timeout == "end":
                return None
            return await self._said_late(self._env, reply)
        finally:
            slots.thinking -= 1
            slots.changed()
            self.sample.turns[-1].env_s = time.monotonic() - begun_s

    async def _said_late(self, env: Env, reply: Reply) -> Say | Done:
        if isinstance(env, KnowsLateness):
            return await self._within_limit(env.timed_out(reply))
        return Say(text=f"No answer within {self._parts.config.env_timeout_s:g} s.")

    async def _within_limit(self, answering: Awaitable[Say | Done]) -> Say | Done:
        limit_s = self._parts.config.env_timeout_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                said = await answering
        except Exception as error:  # the user's code, or its time is over: no answer to this turn
            if limit.expired():
                raise EnvLate(f"no reply within {limit_s:g} s") from error
            raise EnvFailed(_reason(error)) from error
        if not isinstance(said, Say | Done):
            raise EnvFailed(f"it answered {said!r}, neither Say nor Done")
        return said

    async def _extend(self, said: Say, reply: Reply) -> None:
        if sum(v is not None for v in (said.text, said.messages, said.token_ids)) != 1:
            raise EnvFailed("Say needs exactly one of text, messages, token_ids")
        is_chat = self._prompt.row.messages is not None
        try:
            following = await self._parts.token_ids.following(said, is_chat, reply.token_ids)
        except CannotFollow as failure:
            raise EnvFailed(str(failure)) from failure
        self.sample.token_ids += following
        self.sample.messages += said_messages(said)

    async def _close_env(self) -> None:
        close = getattr(self._env, "close", None)
        if close is None:
            return
        try:
            async with asyncio.timeout(self._parts.config.env_timeout_s):
                await close()
        except Exception as error:  # the user's code: the sample is whole, and says so
            self.sample.error = self.sample.error or f"close: {_reason(error)}"


async def _wait_after_abort(fruitful_s: float, limit_s: float) -> None:
    """Without a token since ``fruitful_s``: whoever aborts may do it for long."""
    if time.monotonic() - fruitful_s > limit_s:
        raise RequestFailed(f"given up: aborted for {limit_s:g} s without a new token")
    await asyncio.sleep(AGAIN_S)


def _is_cancelled() -> bool:
    """Whether the present task is to end."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _new_sample(config: RolloutConfig, prompt: Prompt, number: int) -> Sample:
    return Sample(
        row=prompt.number,
        sample=number,
        id=prompt.row.id,
        prompt=prompt.row.prompt,
        messages=list(prompt.row.messages or []),
        token_ids=list(prompt.token_ids),
        logprobs=[],
        prompt_tokens=len(prompt.token_ids),
        finish_reason="",
        reward=None,
        error=None,
        turns=[],
        sampling=sampling_of(config, prompt, number),
        started_at_s=time.time(),
        seconds=0.0,
    )


def _new_turn(begin: int) -> Turn:
    return Turn(
        begin=begin,
        end=begin,
        prompt_tokens=begin,
        cached_tokens=0,
        finish_reason=ABORT,
        weight_version="",
        attempts=0,
        read_bytes=0,
        request_s=0.0,
    )


def _add_span(sample: Sample, span: VersionSpan) -> None:
    last = sample.versions[-1] if sample.versions else None
    if last is not None and (last.version, last.end) == (span.version, span.begin):
        last.end = span.end
    else:
        sample.versions.append(span)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
