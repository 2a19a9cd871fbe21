"""Samples that are not in the journal yet, for a later run: ``_job/groups/kept``.

Ended ones whose group is not whole, and unfinished ones whose run was over. A line each; the last
one of a sample counts, and none once its group is in the journal or dropped.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from launch.rollout.output.schema import Sample
from launch.rollout.output.segment import Segment, whole_lines

COMPACT_BYTES = 64 << 20
"""The file is written anew where it is larger, and less than half of it counts."""


class _Key(msgspec.Struct):
    row: int
    sample: int
    finish_reason: str


class Kept:
    """Of one output folder. One process at a time."""

    def __init__(self, path: Path, done: NDArray[np.bool_]) -> None:
        """``done``: [row, sample], what is not needed any more."""
        self._path = path
        self.file = Segment(path)
        self._places: defaultdict[int, dict[int, tuple[int, int]]] = defaultdict(dict)
        """By row and sample: where its line begins, its length."""
        self._live_bytes = 0
        self.whole = 0
        """Ended samples, when this was opened."""
        whole = {}
        for key, begin, size in whole_lines(path, _Key):
            if not _is_settled(done, key):
                self._place(key.row, key.sample, begin, size)
                whole[key.row, key.sample] = bool(key.finish_reason)
        self.whole = sum(whole.values())
        self._decoder = msgspec.json.Decoder(Sample)
        self._encoder = msgspec.json.Encoder()

    def rows(self) -> list[int]:
        """That have samples here."""
        return list(self._places)

    def of(self, row: int) -> list[Sample]:
        """A row's samples."""
        if row not in self._places:
            return []
        samples = []
        with self._path.open("rb") as file:
            for begin, size in self._places[row].values():
                file.seek(begin)
                samples.append(self._decoder.decode(file.read(size)))
        return samples

    def add(self, sample: Sample) -> None:
        """Raises :class:`~launch.rollout.errors.DiskFull`."""
        line = self._encoder.encode(sample) + b"\n"
        begin = self.file.size_bytes
        self.file.append(line)
        self._place(sample.row, sample.sample, begin, len(line))

    def forget(self, row: int) -> None:
        """Its group is written, or dropped."""
        for _, size in self._places.pop(row, {}).values():
            self._live_bytes -= size
        if self.file.size_bytes > max(COMPACT_BYTES, 2 * self._live_bytes):
            self._compact()

    def close(self) -> None:
        """Nothing can be added any more; nothing is left of a file that holds nothing."""
        self.file.close()
        if not self._places:
            self._path.unlink()

    def _place(self, row: int, sample: int, begin: int, size: int) -> None:
        _, before = self._places[row].get(sample, (0, 0))
        self._places[row][sample] = begin, size
        self._live_bytes += size - before

    def _compact(self) -> None:
        scratch = self._path.with_suffix(".part")
        scratch.unlink(missing_ok=True)
        fresh, places = Segment(scratch), self._places
        self._places, self._live_bytes = defaultdict(dict), 0
        with self._path.open("rb") as file:
            for row, samples in places.items():
                for number, (begin, size) in samples.items():
                    file.seek(begin)
                    self._place(row, number, fresh.size_bytes, size)
                    fresh.append(file.read(size))
        os.replace(scratch, self._path)
        self.file.close()
        self.file, fresh.path = fresh, self._path


def _is_settled(done: NDArray[np.bool_], key: _Key) -> bool:
    """Whether the group of a kept sample, or the sample, is in the journal, where a kill came
    before it was forgotten. One drawn beyond ``--n`` may be there under another number."""
    row, samples = done[key.row], done.shape[1]
    return bool(row.all() or (row[key.sample] if key.sample < samples else row.any()))
