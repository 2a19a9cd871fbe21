"""The job: deals out work into slots, keeps what ends, and stops cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from launch.rollout.client import Client
from launch.rollout.config import RolloutConfig
from launch.rollout.env import load_env
from launch.rollout.episode import Episode, Parts, request_params, sampling_of
from launch.rollout.errors import DiskFull, JobStopped, RequestFailed
from launch.rollout.input.prompt_table import PromptTable
from launch.rollout.output.schema import Sample
from launch.rollout.output.shards import Output
from launch.rollout.slots import Slots, Utilisation
from launch.rollout.token_ids import TokenIds
from launch.rollout.work import Draw, Group, Prime, Work, groups, row_order

log = logging.getLogger(__name__)

SYNC_S = 1.0
"""How often the journal is synced to its disk."""
EPISODES_PER_SLOT = 4
"""Episodes begun: those beyond one a slot wait for their environments."""


class Progress(msgspec.Struct):
    """Counted from the start of this run; ``done_before`` are earlier runs' samples."""

    samples: int
    done_before: int
    done: int = 0
    failed: int = 0
    """Episodes that ended with an error; they are samples all the same."""
    missing: int = 0
    """Samples that could not be had: see errors.jsonl."""
    requests: int = 0
    primes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    read_bytes: int = 0

    def count(self, sample: Sample) -> None:
        self.done += 1
        self.failed += sample.error is not None
        for turn in sample.turns:
            self.requests += 1
            self.generated_tokens += turn.end - turn.begin
            self.prompted(turn.prompt_tokens, turn.cached_tokens, turn.read_bytes)

    def prompted(self, prompt_tokens: int, cached_tokens: int, read_bytes: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.read_bytes += read_bytes


class Summary(Progress, kw_only=True):
    """A run that has ended, for people and for ``summary.json``."""

    failed_before: int
    seconds: float
    generated_tokens_per_s: float
    hit_rate: float
    retries: int
    refused_429: int
    concurrency: int
    utilisation: Utilisation


class Job:
    """One run over an output folder."""

    def __init__(
        self, config: RolloutConfig, table: PromptTable, output: Output, client: Client, limit: int
    ) -> None:
        self._config = config
        self._output = output
        self._client = client
        samples = output.done.size
        done_before = int(output.done.sum())
        self.progress = Progress(samples, done_before)
        self.slots = Slots(limit, samples - done_before)
        client.on_in_flight = self.slots.use.are
        token_ids = TokenIds(client)
        build_env = load_env(config.env) if config.env else None
        self._parts = Parts(config, client, token_ids, self.slots, build_env, table.fields)
        order = row_order(config, table)
        self._groups = groups(order, output.done, table, token_ids)
        self._work = Work(self._groups, limit, self._bad_row)
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
                syncing = tasks.create_task(self._sync())
                for segment in self._output.unsealed():
                    tasks.create_task(self._seal(segment))
                async with asyncio.TaskGroup() as episodes:
                    await self._deal(episodes, tasks)
                syncing.cancel()
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

    async def _deal(self, episodes: asyncio.TaskGroup, tasks: asyncio.TaskGroup) -> None:
        self.slots.changed()
        while True:
            work = await self._work.next()
            if work is None:
                return
            await self._episodes.acquire()
            await self.slots.take(begun=False)
            run = self._prime(work) if isinstance(work, Prime) else self._draw(work, tasks)
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

    async def _draw(self, work: Draw, tasks: asyncio.TaskGroup) -> None:
        episode = Episode(self._parts, work.prompt, work.sample)
        try:
            sample = await episode.run()
        except RequestFailed as failure:
            row = work.prompt.row
            self._missing(work.prompt.number, row.id, [work.sample], str(failure))
            return
        if (segment := self._output.add(sample)) is not None:
            tasks.create_task(self._seal(segment))
        self.progress.count(sample)
        self._ended(1)

    def _bad_row(self, group: Group) -> None:
        self._missing(group.number, group.id, group.samples, group.reason)

    def _missing(self, number: int, row_id: str, samples: list[int], reason: str) -> None:
        log.warning("row=%d id=%s samples=%s missing: %s", number, row_id, samples, reason)
        line = {"row": number, "id": row_id, "samples": samples, "reason": reason}
        try:
            self._errors.write(msgspec.json.encode(line) + b"\n")
        except OSError as error:
            raise DiskFull(f"{self._errors.name}: {error.strerror}") from error
        self.progress.missing += len(samples)
        self._ended(len(samples))

    def _ended(self, samples: int) -> None:
        self.slots.left -= samples
        self.slots.changed()

    # ---- disk -------------------------------------------------------------------------

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
