"""The job: deals out work into slots, keeps what ends, and stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

import msgspec

from launch.rollout.client import Client
from launch.rollout.config import RolloutConfig
from launch.rollout.env import load_env
from launch.rollout.episode import Parts
from launch.rollout.errors import DiskFull, JobStopped, RequestFailed
from launch.rollout.groups.gathering import Gathering
from launch.rollout.groups.group import Group
from launch.rollout.input.prompt_table import PromptTable
from launch.rollout.input.sampling import request_params, sampling_of
from launch.rollout.output.shards import Output
from launch.rollout.progress import Progress, Summary
from launch.rollout.recording.server import RecordingServer
from launch.rollout.slots import Slots
from launch.rollout.token_ids import NoTokenIds, TokenIds
from launch.rollout.work import Prime, Source, Work

log = logging.getLogger(__name__)

SYNC_S = 1.0
"""How often the journal is synced to its disk."""
VERSION_S = 1.0
"""How often the endpoint is asked which weights it serves."""
EPISODES_PER_SLOT = 4
"""Episodes begun: those beyond one a slot wait for their environments."""


class Job:
    """One run over an output folder."""

    def __init__(
        self,
        config: RolloutConfig,
        table: PromptTable,
        output: Output,
        client: Client,
        limit: int,
        recording: RecordingServer | None = None,
    ) -> None:
        """``recording``: of a job with a harness."""
        self._config = config
        self._output = output
        self._client = client
        samples = output.done.size
        self.progress = Progress(samples, int(output.done.sum()))
        token_ids = TokenIds(client) if recording is None else NoTokenIds(client)
        source = Source(config, table, output, token_ids)
        # Of a run that makes some groups only, those count that it has begun.
        self.slots = Slots(limit, 0 if config.groups else source.draws())
        client.on_in_flight = self.slots.use.are
        build_env = load_env(config.env) if config.env else None
        self._parts = Parts(config, client, token_ids, self.slots, build_env, table.fields)
        self._parts.recording = recording
        self._gathering = Gathering(self._parts, output, self.progress)
        self._gathering.on_missing = self._missing
        self._groups = source.groups()
        self._work = Work(self._groups, limit, self._gathering)
        self._episodes = asyncio.Semaphore(EPISODES_PER_SLOT * limit)
        self._sealing = asyncio.Lock()
        self.seconds = 0.0
        self._errors: IO[bytes] = errors_path(config.output_folder).open("wb", buffering=0)

    async def run(self) -> None:
        """Until every sample is done or known to be missing. Raises :class:`JobStopped`;
        then, and when cancelled, what was generated is kept."""
        begun_s = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                aside = [tasks.create_task(self._sync()), tasks.create_task(self._watch())]
                for segment in self._output.unsealed():
                    tasks.create_task(self._seal(segment))
                self._gathering.on_full = partial(self._begin_sealing, tasks)
                await self._gathering.ask_version()
                async with asyncio.TaskGroup() as episodes:
                    await self._deal(episodes)
                for task in aside:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from group
        finally:
            self.seconds = time.monotonic() - begun_s
            await self._groups.aclose()
            self._errors.close()

    def summary(self) -> Summary:
        """What this run did."""
        progress, seconds = self.progress, max(self.seconds, 1e-9)
        prompts = max(progress.prompt_tokens, 1)
        return Summary(
            **msgspec.structs.asdict(progress),
            failed_before=self._output.failed - progress.failed,
            seconds=round(self.seconds, 3),
            generated_tokens_per_s=round(progress.generated_tokens / seconds, 1),
            hit_rate=round(progress.cached_tokens / prompts, 4),
            retries=self._client.retries,
            refused_429=self._client.full,
            concurrency=self.slots.limit,
            utilisation=self.slots.use.summary(),
        )

    # ---- dealing ----------------------------------------------------------------------

    async def _deal(self, episodes: asyncio.TaskGroup) -> None:
        self.slots.changed()
        while (work := await self._work.next()) is not None:
            if isinstance(work, Group) and work.prompt is None:
                self._bad_row(work)
                continue
            if isinstance(work, Group):
                episodes.create_task(self._gathering.close(work))
                continue
            await self._episodes.acquire()
            await self.slots.take(begun=False)
            if isinstance(work, Prime):
                run = self._prime(work)
            else:
                run = self._gathering.draw(work.group, work.sample)
            episodes.create_task(run).add_done_callback(lambda _: self._episodes.release())

    async def _prime(self, work: Prime) -> None:
        prompt = work.group.prompt
        assert prompt is not None
        params = request_params(sampling_of(self._config, prompt, 0), room_tokens=1)
        try:
            answer = await self._client.generate(
                prompt.token_ids, params, False, f"{prompt.number}.prime"
            )
            self.progress.primes += 1
            tokens = len(prompt.token_ids)
            self.progress.prompted(tokens, answer.cached_tokens, answer.read_bytes)
        except RequestFailed as failure:
            log.warning("row=%d not primed: %s", prompt.number, failure)
        finally:
            self._work.primed(work.group)
            self.slots.give_back()

    def _bad_row(self, group: Group) -> None:
        self._missing(group, group.wanted, group.reason)
        if not self._config.groups:
            self.slots.left -= len(group.wanted) + self._config.oversample_samples
            self.slots.changed()

    def _missing(self, group: Group, samples: list[int], reason: str) -> None:
        log.warning("row=%d id=%s samples=%s missing: %s", group.number, group.id, samples, reason)
        line = {"row": group.number, "id": group.id, "samples": samples, "reason": reason}
        try:
            self._errors.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise DiskFull(f"{self._errors.name}: {error.strerror}") from error
        self.progress.missing += len(samples)

    # ---- disk -------------------------------------------------------------------------

    def _begin_sealing(self, tasks: asyncio.TaskGroup, segment: Path) -> None:
        tasks.create_task(self._seal(segment))

    async def _seal(self, segment: Path) -> None:
        async with self._sealing:
            sealing = asyncio.ensure_future(asyncio.to_thread(self._output.seal, segment))
            try:
                await asyncio.shield(sealing)
            except asyncio.CancelledError:
                await asyncio.wait({sealing})  # a thread cannot be cancelled
                raise

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self._output.sync)

    async def _watch(self) -> None:
        """Drop what has become stale."""
        while True:
            await asyncio.sleep(VERSION_S)
            await self._gathering.ask_version()
            await self._gathering.drop_stale()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What stopped the job, or else whatever went wrong."""
    error: BaseException = group.subgroup(JobStopped) or group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def errors_path(folder: Path) -> Path:
    """Rows and samples that the last run could not have, one JSON object a line."""
    return folder / "_job" / "errors.jsonl"


async def until_done(job: Job, every_s: float, show: Callable[[Job], None]) -> None:
    """Run ``job`` and ``show`` it again and again."""

    async def ticker() -> None:
        while True:
            show(job)
            await asyncio.sleep(every_s)

    ticking = asyncio.create_task(ticker())
    try:
        await job.run()
    finally:
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
        show(job)
