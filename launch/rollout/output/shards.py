"""Where samples go, each exactly once: a journal that becomes Parquet shards.

The samples of a group are one line (a JSON array) of the open segment
``_job/journal/NNNNNN.journal``: all are there, or none. A segment that is full becomes
``part-NNNNNN.parquet``: written beside, synced, renamed; only then is the segment removed. So a
number names a shard or a segment; where a kill left both, the shard is whole and the segment goes.
A group that is not wanted is a line of ``_job/groups/dropped``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from launch.rollout.errors import DiskFull
from launch.rollout.groups.version_log import VersionLog
from launch.rollout.input.prompt_table import PromptTable
from launch.rollout.output.kept import Kept
from launch.rollout.output.schema import COLUMNS, Key, Sample, sample_columns, trajectories
from launch.rollout.output.segment import Segment, sync, whole_lines

BATCH_BYTES = 8 << 20
BATCH_LINES = 512
"""Journal read, and rows encoded, at a time: bounds the memory of sealing a segment."""


Line = tuple[int, int, int, int]
"""Of the journal: row, first sample, where it begins, its length."""


class Dropped(msgspec.Struct):
    """A line of ``dropped``: samples that were generated, and are not in the output."""

    row: int
    id: str
    samples: list[int]
    reason: str
    """"filter" or "stale"."""
    rewards: list[float | None]
    """Of those that had ended."""


class Output:
    """The shards and the journal of one output folder. One process at a time."""

    def __init__(self, folder: Path, table: PromptTable, n: int, shard_bytes: int) -> None:
        self._folder = folder
        self._journal = folder / "_job" / "journal"
        self._journal.mkdir(exist_ok=True)
        self._table = table
        self._shard_bytes = shard_bytes
        self._encoder = msgspec.json.Encoder()
        self.done: NDArray[np.bool_] = np.zeros((table.rows, n), np.bool_)
        """[row, sample]: what is in a shard or in the journal, or was dropped."""
        self.failed = 0
        """Done samples that carry an error."""
        self.dropped = 0
        """Done samples that were dropped."""
        self._number = self._recover()
        self._segment = Segment(self._segment_path(self._number))
        groups = folder / "_job" / "groups"
        groups.mkdir(exist_ok=True)
        self._dropped = Segment(groups / "dropped")
        for line, _, _ in whole_lines(self._dropped.path, Dropped):
            self._settle(line)
        self.kept = Kept(groups / "kept", self.done)
        self.versions = VersionLog(groups / "versions")

    def add(self, samples: Sequence[Sample]) -> Path | None:
        """Acknowledge samples of one group; the segment that is full now, for :meth:`seal`. Raises
        :class:`DiskFull`."""
        for sample in samples:
            if self.done[sample.row, sample.sample]:
                raise ValueError(f"row {sample.row} sample {sample.sample} is done already")
        self._segment.append(self._encoder.encode(samples) + b"\n")
        for sample in samples:
            self.done[sample.row, sample.sample] = True
            self.failed += sample.error is not None
        return self._next_segment() if self._segment.size_bytes >= self._shard_bytes else None

    def drop(self, group: Dropped) -> None:
        """Never make these samples again; raises :class:`DiskFull`."""
        self._dropped.append(self._encoder.encode(group) + b"\n")
        self._settle(group)

    def _settle(self, group: Dropped) -> None:
        self.done[group.row, group.samples] = True
        self.dropped += len(group.samples)

    def sync(self) -> None:
        """Have what was added survive a loss of power; may run in a thread of its own."""
        for file in (self._segment, self.kept.file, self._dropped):
            with contextlib.suppress(FileNotFoundError):  # it became a shard, which is synced
                sync(file.path)

    def seal(self, segment: Path) -> None:
        """Make a segment a shard; takes seconds, and may run in a thread of its own."""
        shard = self._shard_path(int(segment.stem))
        scratch = segment.with_suffix(".part")
        try:
            self._write(segment, scratch)
            sync(scratch)
            os.replace(scratch, shard)
            sync(self._folder)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise DiskFull(f"{shard}: {error.strerror or error}") from error
        segment.unlink()

    def finish(self) -> None:
        """Make shards of all that the journal holds; nothing can be added any more. Raises
        :class:`DiskFull`."""
        self.kept.close()
        self._dropped.close()
        self._segment.close()
        if not self._segment.size_bytes:
            self._segment.path.unlink()
        for segment in self._segments():
            self.seal(segment)

    def unsealed(self) -> list[Path]:
        """Full segments that an earlier run left."""
        return [p for p in self._segments() if p != self._segment.path]

    # ---- files ------------------------------------------------------------------------

    def _segment_path(self, number: int) -> Path:
        return self._journal / f"{number:06}.journal"

    def _shard_path(self, number: int) -> Path:
        return self._folder / f"part-{number:06}.parquet"

    def _segments(self) -> list[Path]:
        return sorted(self._journal.glob("*.journal"))

    def _next_segment(self) -> Path:
        full = self._segment
        full.close()
        self._number += 1
        self._segment = Segment(self._segment_path(self._number))
        return full.path

    def _recover(self) -> int:
        """Fill ``done``; returns the number of the segment to go on with."""
        for scratch in self._journal.glob("*.part"):
            scratch.unlink()
        shards = sorted(self._folder.glob("part-*.parquet"))
        for shard in shards:
            table = pq.read_table(shard, columns=["row", "sample", "error"])
            samples = table["row"].to_numpy(), table["sample"].to_numpy()
            self.done[samples] = True
            failed = table["error"].is_valid().to_numpy()
            places = zip(*(numbers[failed].tolist() for numbers in samples), strict=True)
            self.failed += len(set(places))  # an episode may have many rows
        sealed = {int(shard.stem.removeprefix("part-")) for shard in shards}
        number = max(sealed, default=-1) + 1
        for segment in self._segments():
            if int(segment.stem) in sealed:
                segment.unlink()
                continue
            number = max(number, int(segment.stem))
            for keys, _, _ in whole_lines(segment, list[Key]):
                for key in keys:
                    self.done[key.row, key.sample] = True
                    self.failed += key.error is not None
        return number

    def _write(self, segment: Path, scratch: Path) -> None:
        schema = pa.schema([*COLUMNS, *self._table.carried_schema])
        lines = sorted(
            (keys[0].row, keys[0].sample, begin, size)
            for keys, begin, size in whole_lines(segment, list[Key])
        )
        decoder = msgspec.json.Decoder(list[Sample])
        with (
            segment.open("rb") as file,
            pq.ParquetWriter(scratch, schema, compression="zstd") as writer,
        ):
            for batch in _batches(lines):
                samples: list[Sample] = []
                for _, _, begin, size in batch:
                    file.seek(begin)
                    for sample in decoder.decode(file.read(size)):
                        samples += trajectories(sample)
                carried = self._table.carried([sample.row for sample in samples])
                arrays = [*sample_columns(samples), *carried]
                writer.write_table(pa.table(arrays, schema=schema))


def _batches(lines: Sequence[Line]) -> Iterator[list[Line]]:
    batch: list[Line] = []
    size_bytes = 0
    for line in lines:
        batch.append(line)
        size_bytes += line[3]
        if len(batch) == BATCH_LINES or size_bytes >= BATCH_BYTES:
            yield batch
            batch, size_bytes = [], 0
    if batch:
        yield batch
