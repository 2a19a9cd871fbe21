"""Where samples go, each exactly once: a journal that becomes Parquet shards.

A finished sample is a line of the open segment ``_job/journal/NNNNNN.journal``. A segment
that is full becomes ``part-NNNNNN.parquet``: written beside, synced, renamed; only then is
the segment removed. So a number names a shard or a segment; where a kill left both, the
shard is whole and the segment goes. A line that a kill cut short is not a sample.
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
from launch.rollout.input.prompt_table import PromptTable
from launch.rollout.output.schema import COLUMNS, Key, Sample, sample_columns

GROUP_BYTES = 8 << 20
GROUP_ROWS = 512
"""Journal read, and rows encoded, at a time: bounds the memory of sealing a segment."""


Line = tuple[int, int, int, int]
"""Of the journal: row, sample, where it begins, its length."""


class Segment:
    """The journal's file that is written now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.size_bytes = _whole_lines(path)
        os.ftruncate(self._file, self.size_bytes)

    def append(self, line: bytes) -> None:
        """Returns when the line would survive the death of this process."""
        rest = memoryview(line)
        try:
            while rest:  # a disk that is nearly full takes a part, and refuses the next
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self.size_bytes)
            raise DiskFull(f"{self.path}: {error.strerror}") from error
        self.size_bytes += len(line)

    def close(self) -> None:
        os.close(self._file)


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
        """[row, sample]: what is in a shard or in the journal."""
        self.failed = 0
        """Done samples that carry an error."""
        self._number = self._recover()
        self._segment = Segment(self._segment_path(self._number))

    def add(self, sample: Sample) -> Path | None:
        """Acknowledge a sample; the segment that is full now, for :meth:`seal`. Raises
        :class:`DiskFull`."""
        if self.done[sample.row, sample.sample]:
            raise ValueError(f"row {sample.row} sample {sample.sample} is done already")
        self._segment.append(self._encoder.encode(sample) + b"\n")
        self.done[sample.row, sample.sample] = True
        self.failed += sample.error is not None
        return self._next_segment() if self._segment.size_bytes >= self._shard_bytes else None

    def sync(self) -> None:
        """Have what was added survive a loss of power; may run in a thread of its own."""
        with contextlib.suppress(FileNotFoundError):  # it became a shard, which is synced
            _sync(self._segment.path)

    def seal(self, segment: Path) -> None:
        """Make a segment a shard; takes seconds, and may run in a thread of its own."""
        shard = self._shard_path(int(segment.stem))
        scratch = segment.with_suffix(".part")
        try:
            self._write(segment, scratch)
            _sync(scratch)
            os.replace(scratch, shard)
            _sync(self._folder)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise DiskFull(f"{shard}: {error.strerror or error}") from error
        segment.unlink()

    def finish(self) -> None:
        """Make shards of all that the journal holds; nothing can be added any more. Raises
        :class:`DiskFull`."""
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
            keys = pq.read_table(shard, columns=["row", "sample", "error"])
            samples = keys["row"].to_numpy(), keys["sample"].to_numpy()
            self.done[samples] = True
            self.failed += len(keys) - keys["error"].null_count
        sealed = {int(shard.stem.removeprefix("part-")) for shard in shards}
        number = max(sealed, default=-1) + 1
        for segment in self._segments():
            if int(segment.stem) in sealed:
                segment.unlink()
                continue
            number = max(number, int(segment.stem))
            for key, _, _ in _keys(segment):
                self.done[key.row, key.sample] = True
                self.failed += key.error is not None
        return number

    def _write(self, segment: Path, scratch: Path) -> None:
        schema = pa.schema([*COLUMNS, *self._table.carried_schema])
        lines = sorted((key.row, key.sample, begin, size) for key, begin, size in _keys(segment))
        decoder = msgspec.json.Decoder(Sample)
        with (
            segment.open("rb") as file,
            pq.ParquetWriter(scratch, schema, compression="zstd") as writer,
        ):
            for group in _groups(lines):
                samples = []
                for _, _, begin, size in group:
                    file.seek(begin)
                    samples.append(decoder.decode(file.read(size)))
                carried = self._table.carried([sample.row for sample in samples])
                arrays = [*sample_columns(samples), *carried]
                writer.write_table(pa.table(arrays, schema=schema))


def _groups(
    lines: Sequence[tuple[int, int, int, int]],
) -> Iterator[list[tuple[int, int, int, int]]]:
    group: list[Line] = []
    size_bytes = 0
    for line in lines:
        group.append(line)
        size_bytes += line[3]
        if len(group) == GROUP_ROWS or size_bytes >= GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _keys(segment: Path) -> Iterator[tuple[Key, int, int]]:
    """Of each whole line: which sample, where it begins, its length."""
    decoder, begin = msgspec.json.Decoder(Key), 0
    with segment.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line), begin, len(line)
            begin += len(line)


def _whole_lines(path: Path) -> int:
    """Bytes up to and with the last newline."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while size:
            begin = max(0, size - (1 << 20))
            file.seek(begin)
            found = file.read(size - begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            size = begin
    return 0


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
