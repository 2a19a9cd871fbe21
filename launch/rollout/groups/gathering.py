"""Groups from their opening to the output: whole, judged, written or dropped.

A group is closed as soon as it is whole, and what else is drawn of it is aborted. A run that needs
a certain number of groups ends with them; what the others have is kept for the next run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from launch.rollout.answers import Generation
from launch.rollout.episode import Cut, Episode, Parts
from launch.rollout.errors import RequestFailed
from launch.rollout.groups.group import Group
from launch.rollout.groups.hooks import Hooks, WholeGroup
from launch.rollout.output.schema import Sample, trajectories
from launch.rollout.output.shards import Dropped, Output
from launch.rollout.progress import Progress
from launch.rollout.recording.episode import HarnessEpisode

log = logging.getLogger(__name__)


class Gathering:
    """Those of one run."""

    def __init__(self, parts: Parts, output: Output, progress: Progress) -> None:
        config = parts.config
        self._parts = parts
        parts.on_answer = self._answered
        self._config = config
        self._output = output
        self._versions = output.versions
        self._progress = progress
        self._hooks = Hooks(config.group_reward, config.filter, config.group_timeout_s)
        self._open: dict[int, Group] = {}
        self.is_over = False
        """There are as many groups as this run was to make."""
        self.on_change: Callable[[], None] = lambda: None
        """Called when a group was settled."""
        self.on_full: Callable[[Path], None] = lambda _: None
        """Called with each segment of the journal that is full."""
        self.on_missing: Callable[[Group, list[int], str], None] = lambda *_: None
        """Called with samples of a group that could not be had, and why."""

    # ---- opening ----------------------------------------------------------------------

    @property
    def may_open(self) -> bool:
        """Whether another group is to be begun now."""
        config = self._config
        if not config.groups:
            return True
        lacking = config.groups - self._progress.groups
        return not self.is_over and len(self._open) < lacking + config.oversample_groups

    def opened(self, group: Group) -> None:
        group.to_end = len(group.drawn)
        self._open[group.number] = group
        if self._config.groups:
            self._parts.slots.left += len(group.drawn)
            self._parts.slots.changed()

    # ---- episodes ---------------------------------------------------------------------

    async def draw(self, group: Group, number: int) -> None:
        """Run one episode, for which a slot is held; does nothing if its group is closed. Raises
        :class:`~launch.rollout.errors.JobStopped`."""
        slots = self._parts.slots
        if group.is_closed or group.prompt is None:
            slots.left -= 1
            slots.give_back()
            slots.changed()
            return
        kind = HarnessEpisode if self._parts.recording is not None else Episode
        episode = kind(self._parts, group.prompt, number, group.begun.get(number))
        group.running.add(episode)
        try:
            sample = await episode.run()
            group.running.discard(episode)
            await self._ended(group, sample)
        except RequestFailed as failure:
            group.failures.append(str(failure))
        except Cut:
            self._progress.aborted += 1
            if group.keeps_begun and episode.is_resumable:
                self._output.kept.add(episode.sample)
        finally:
            group.running.discard(episode)
            group.to_end -= 1
            slots.left -= 1
            slots.changed()
        if not group.to_end and not group.is_closed:
            self._lacking(group)

    async def _ended(self, group: Group, sample: Sample) -> None:
        if group.is_closed and not group.keeps_begun:
            return  # it came just after the last one that was wanted
        group.whole.append(sample)
        if group.is_closed or not group.is_whole or self._hooks.are_any:
            self._output.kept.add(sample)
        if not group.is_closed and group.is_whole:
            await self.close(group)

    async def close(self, group: Group) -> None:
        """It is whole: write or drop it; raises :class:`~launch.rollout.errors.JobStopped`."""
        await self._stop(group, keep=False)
        whole = None
        if self._hooks.are_any and group.prompt is not None:
            row = self._parts.fields_of(group.number, group.prompt.row)
            whole = WholeGroup(row, group.chosen())
            await self._hooks.reward(whole)
        if self._config.is_staleness_bounded:
            await self.ask_version()
        if self._is_stale(group):
            self._drop(group, "stale")
        elif whole is None or await self._hooks.keeps(whole):
            self._write(group)
            self._progress.groups += 1
        else:
            self._drop(group, "filter")
        if self._config.groups and self._progress.groups >= self._config.groups:
            await self._end()

    def _lacking(self, group: Group) -> None:
        """Nothing more of it can be had. What judges whole groups sees no other ones."""
        group.is_closed = True
        lacking = group.wanted
        if group.whole and not self._hooks.are_any:
            lacking = sorted(set(group.wanted) - {sample.sample for sample in group.chosen()})
            self._write(group)
        else:
            del self._open[group.number]
            lacking = lacking[len(group.whole) :]
        self.on_missing(group, lacking, group.failures[0])
        self.on_change()

    # ---- staleness --------------------------------------------------------------------

    def _answered(self, prompt_tokens: int, answer: Generation, continues: bool) -> None:
        """To a request of any episode; ``continues``: not the first one of its turn."""
        self._progress.answered(prompt_tokens, answer, continues)
        self._versions.heard(answer.versions)

    async def ask_version(self) -> None:
        """Which weights are served now; an endpoint that does not say is asked again later."""
        with contextlib.suppress(RequestFailed):
            self._versions.served(await self._parts.client.weight_version())

    async def drop_stale(self) -> None:
        """Those of the open groups that are too far behind, as is set."""
        for group in list(self._open.values()):
            if not group.is_closed and self._is_stale(group):
                await self._stop(group, keep=False)
                self._drop(group, "stale")

    def _is_stale(self, group: Group) -> bool:
        limit = self._config.max_staleness_commits
        if limit is None or self._config.on_stale != "drop":
            return False
        return self._versions.staleness_commits(group.samples()) > limit

    # ---- the end of a group -----------------------------------------------------------

    def _write(self, group: Group) -> None:
        limit = self._config.loss_staleness_commits
        samples = group.chosen()
        for sample in samples:
            sample.staleness_commits = self._versions.staleness_commits([sample])
            for span in [span for one in trajectories(sample) for span in one.versions]:
                behind = self._versions.behind_commits(span.version)
                span.in_loss = limit is None or behind <= limit
        if (segment := self._output.add(samples)) is not None:
            self.on_full(segment)
        self._progress.count(samples)
        self._settled(group)

    def _drop(self, group: Group, reason: str) -> None:
        log.info("dropped row=%d id=%s: %s", group.number, group.id, reason)
        rewards = [sample.reward for sample in group.whole]
        self._output.drop(Dropped(group.number, group.id, group.wanted, reason, rewards))
        self._progress.dropped += len(group.wanted)
        self._settled(group)

    def _settled(self, group: Group) -> None:
        del self._open[group.number]
        self._output.kept.forget(group.number)
        self.on_change()

    async def _stop(self, group: Group, keep: bool) -> None:
        """Draw nothing more of it."""
        group.is_closed, group.keeps_begun = True, keep
        await asyncio.gather(*(episode.cut(keep) for episode in group.running))

    async def _end(self) -> None:
        """This run has the groups that it was to make. Those that are judged at this moment are
        written, too."""
        self.is_over = True
        self.on_change()
        keep = not self._config.drop_partial
        begun = [group for group in self._open.values() if not group.is_closed]
        await asyncio.gather(*(self._stop(group, keep) for group in begun))
