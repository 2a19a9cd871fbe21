"""One sample: turns of the model and answers of its environment, until it ends."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable

import msgspec

from common.json import JsonObject
from launch.rollout.client import Client, Generation
from launch.rollout.config import RolloutConfig
from launch.rollout.env import Done, Env, Reply, Say
from launch.rollout.errors import RequestFailed
from launch.rollout.input.rows import SAMPLING_COLUMNS, Row, Sampling
from launch.rollout.output.schema import Sample, Turn
from launch.rollout.slots import Slots
from launch.rollout.token_ids import CannotFollow, TokenIds, said_messages


class EnvFailed(Exception):
    """The environment raised, took too long, or answered with something else."""


class Prompt(msgspec.Struct):
    """A row that is ready to be sampled."""

    number: int
    row: Row
    token_ids: list[int]


class Parts(msgspec.Struct, frozen=True):
    """What all episodes of a job share."""

    config: RolloutConfig
    client: Client
    token_ids: TokenIds
    slots: Slots
    build_env: Callable[[JsonObject], Env] | None
    fields_of: Callable[[int, Row], JsonObject]
    """The whole input row, for the environment."""


class Episode:
    """Sample ``number`` of a prompt."""

    def __init__(self, parts: Parts, prompt: Prompt, number: int) -> None:
        self._parts = parts
        self._prompt = prompt
        self._sampling = sampling_of(parts.config, prompt, number)
        self._env: Env | None = None
        self._holds_slot = True
        self.sample = Sample(
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
            sampling=self._sampling,
            started_at_s=time.time(),
            seconds=0.0,
        )

    async def run(self) -> Sample:
        """Holds a slot when called, none when it ends, however; raises
        :class:`RequestFailed`."""
        begun_s = time.monotonic()
        sample = self.sample
        try:
            sample.finish_reason = await self._turns()
        except EnvFailed as failure:
            sample.finish_reason, sample.error = "env_error", str(failure)
        finally:
            self._give_back()
            await self._close_env()
        sample.seconds = time.monotonic() - begun_s
        return sample

    async def _turns(self) -> str:
        """Returns the finish reason."""
        sample, slots, config = self.sample, self._parts.slots, self._parts.config
        self._env = await self._build_env()
        for number in range(config.max_turns):
            room_tokens = config.max_episode_tokens - len(sample.token_ids)
            if room_tokens < 1:
                if number:
                    return "max_episode_tokens"
                raise RequestFailed(f"the prompt alone has {len(sample.token_ids)} tokens")
            if not self._holds_slot:
                await slots.take(begun=True)
                self._holds_slot = True
            answer = await self._generate(number, room_tokens)
            self._give_back()
            if self._env is None:
                return answer.finish_reason
            said = await self._reply(number, answer)
            if isinstance(said, Done):
                sample.reward = said.reward
                return "done"
            if number + 1 < config.max_turns:
                await self._extend(said, answer)
        return "max_turns"

    def _give_back(self) -> None:
        if self._holds_slot:
            self._holds_slot = False
            self._parts.slots.give_back()

    async def _generate(self, turn: int, room_tokens: int) -> Generation:
        sample, parts = self.sample, self._parts
        name = f"{sample.row}.{sample.sample}.{turn}"
        params = request_params(self._sampling, room_tokens)
        answer = await parts.client.generate(sample.token_ids, params, parts.config.logprobs, name)
        begin = len(sample.token_ids)
        sample.token_ids += answer.token_ids
        sample.logprobs += answer.logprobs
        sample.messages.append({"role": "assistant", "content": answer.text})
        sample.turns.append(
            Turn(
                begin=begin,
                end=len(sample.token_ids),
                prompt_tokens=begin,
                cached_tokens=answer.cached_tokens,
                finish_reason=answer.finish_reason,
                weight_version=answer.weight_version,
                attempts=answer.attempts,
                read_bytes=answer.read_bytes,
                request_s=answer.seconds,
            )
        )
        return answer

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

    async def _reply(self, number: int, answer: Generation) -> Say | Done:
        assert self._env is not None
        slots, limit_s = self._parts.slots, self._parts.config.env_timeout_s
        reply = Reply(number, answer.text, answer.token_ids, answer.logprobs, answer.finish_reason)
        begun_s = time.monotonic()
        slots.thinking += 1
        slots.changed()
        try:
            async with asyncio.timeout(limit_s):
                said = await self._env.reply(reply)
        except Exception as error:  # the user's code, or its time is over: no answer to this turn
            late = isinstance(error, TimeoutError) and not str(error)
            reason = f"no reply within {limit_s:g} s" if late else _reason(error)
            raise EnvFailed(reason) from error
        finally:
            slots.thinking -= 1
            slots.changed()
            self.sample.turns[-1].env_s = time.monotonic() - begun_s
        if not isinstance(said, Say | Done):
            raise EnvFailed(f"it answered {said!r}, neither Say nor Done")
        return said

    async def _extend(self, said: Say, answer: Generation) -> None:
        if sum(v is not None for v in (said.text, said.messages, said.token_ids)) != 1:
            raise EnvFailed("Say needs exactly one of text, messages, token_ids")
        is_chat = self._prompt.row.messages is not None
        try:
            following = await self._parts.token_ids.following(said, is_chat, answer.token_ids)
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


def sampling_of(config: RolloutConfig, prompt: Prompt, sample: int) -> Sampling:
    """The row's sampling columns over the job's flags; the seed is the sample's own."""
    row = {name: getattr(prompt.row, name) for name in SAMPLING_COLUMNS}
    sampling = msgspec.structs.replace(
        Sampling(
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            stop=list(config.stop),
        ),
        **{name: value for name, value in row.items() if value is not None},
    )
    if sampling.seed is None:
        return sampling
    text = f"{sampling.seed}/{prompt.number}/{sample}".encode()
    own = int.from_bytes(hashlib.blake2b(text, digest_size=4).digest()) >> 1
    return msgspec.structs.replace(sampling, seed=own)


def request_params(sampling: Sampling, room_tokens: int) -> JsonObject:
    """SGLang's ``sampling_params``."""
    params: JsonObject = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": min(sampling.max_new_tokens, room_tokens),
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    if sampling.stop:
        params["stop"] = sampling.stop
    return params


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
