"""A prompt's samples on their way, from the first request to the last."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from launch.rollout.episode import Episode
from launch.rollout.input.rows import Prompt
from launch.rollout.output.schema import Sample


class Group(msgspec.Struct, eq=False):
    """The missing samples of one row, or why it has none."""

    number: int
    """The row's."""
    id: str
    wanted: list[int]
    """Numbers of the samples that the output lacks."""
    prompt: Prompt | None
    reason: str = ""
    drawn: list[int] = []
    """Numbers of the samples that are to be drawn: with over-sampling, more than are lacking."""
    begun: dict[int, Sample] = {}
    """Of them, what an earlier run has begun."""
    whole: list[Sample] = []
    """Those that have ended, at most as many as are wanted."""
    running: set[Episode] = set()
    to_end: int = 0
    """Draws that have not ended."""
    failures: list[str] = []
    """Why samples could not be had."""
    is_closed: bool = False
    """Nothing more of it is drawn."""
    keeps_begun: bool = False
    """A later run goes on with it."""

    @property
    def is_whole(self) -> bool:
        return len(self.whole) >= len(self.wanted)

    def samples(self) -> Iterator[Sample]:
        """All that has tokens."""
        yield from self.whole
        running = {episode.sample.sample: episode.sample for episode in self.running}
        yield from running.values()
        ended = {sample.sample for sample in self.whole}
        yield from (s for k, s in self.begun.items() if k not in running and k not in ended)

    def chosen(self) -> list[Sample]:
        """The whole ones, in order, under numbers that are wanted."""
        free = sorted(set(self.wanted) - {sample.sample for sample in self.whole})
        self.whole.sort(key=lambda s: s.sample)
        for sample in self.whole:
            if sample.sample not in self.wanted:
                sample.sample = free.pop(0)
        return sorted(self.whole, key=lambda s: s.sample)
