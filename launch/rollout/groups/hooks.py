"""What judges a whole group: ``--group-reward`` and ``--filter``, ``module:function``.

Both get a :class:`WholeGroup`; coroutine functions are awaited, others run in a thread of their
own. One that raises, or answers with something else, stops the job: all samples are kept for the
next run.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import threading
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

from common.json import JsonObject
from launch.rollout.errors import JobStopped
from launch.rollout.output.schema import Sample


class WholeGroup(msgspec.Struct, frozen=True):
    """A prompt and all of its samples."""

    row: JsonObject
    """As the input has it."""
    samples: list[Sample]
    """In the order of their numbers. A reward function sees those of the environment."""


Hook = Callable[[WholeGroup], object]


class BadHook(Exception):
    """A hook names nothing that can be called; the text says why."""


def load_hook(name: str) -> Hook:
    """The function ``module:function``; raises :class:`BadHook`."""
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise BadHook("write it as module:function")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadHook(str(error)) from error
    if not callable(found):
        raise BadHook(f"{attribute} is no function")
    return cast(Hook, found)


class Hooks:
    """Those of one job."""

    def __init__(self, group_reward: str, filter_name: str, limit_s: float) -> None:
        """Names, empty for none; seconds for one answer. Raises :class:`BadHook`."""
        self._reward = load_hook(group_reward) if group_reward else None
        self._filter = load_hook(filter_name) if filter_name else None
        self._limit_s = limit_s

    @property
    def are_any(self) -> bool:
        return self._reward is not None or self._filter is not None

    async def reward(self, group: WholeGroup) -> None:
        """Give each sample its reward, if there is a function for that; raises
        :class:`JobStopped`."""
        if self._reward is None:
            return
        given = await self._answer("--group-reward", self._reward, group)
        rewards = _numbers(given)
        if rewards is None or len(rewards) != len(group.samples):
            raise JobStopped(
                f"--group-reward answered {given!r}, not {len(group.samples)} numbers for row "
                f"{group.row.get('id')}"
            )
        for sample, reward in zip(group.samples, rewards, strict=True):
            sample.reward = reward

    async def keeps(self, group: WholeGroup) -> bool:
        """Whether the group is to be written; raises :class:`JobStopped`."""
        if self._filter is None:
            return True
        kept = await self._answer("--filter", self._filter, group)
        if not isinstance(kept, bool):
            raise JobStopped(f"--filter answered {kept!r}, neither True nor False")
        return kept

    async def _answer(self, flag: str, hook: Hook, group: WholeGroup) -> object:
        try:
            async with asyncio.timeout(self._limit_s) as limit:
                if not inspect.iscoroutinefunction(hook):
                    return await _in_thread(hook, group)
                return await hook(group)
        except Exception as error:  # the user's code, or its time is over: nothing is known
            late = f"no answer within {self._limit_s:g} s"
            said = late if limit.expired() else f"{type(error).__name__}: {error}"
            raise JobStopped(f"{flag}, row {group.row.get('id')}: {said}") from error


def _numbers(values: object) -> list[float] | None:
    if not isinstance(values, Sequence):
        return None
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        return None
    return [float(v) for v in values]


async def _in_thread(hook: Hook, group: WholeGroup) -> object:
    """In one that the end of the job does not wait for, as it would for asyncio's."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[object] = loop.create_future()

    def settle(value: object, error: Exception | None) -> None:
        if answer.cancelled():
            return
        if error is not None:
            answer.set_exception(error)
        else:
            answer.set_result(value)

    def work() -> None:
        value, failure = None, None
        try:
            value = hook(group)
        except Exception as error:  # the user's code: raised where it is awaited
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name="group hook", daemon=True).start()
    return await answer
