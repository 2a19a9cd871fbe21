"""A file of lines that grows: a line that a kill cut short is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from launch.rollout.errors import DiskFull

T = TypeVar("T")


class Segment:
    """The file that is written now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.size_bytes = _whole_bytes(path)
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


def whole_lines(path: Path, kind: type[T]) -> Iterator[tuple[T, int, int]]:
    """Each line as one of ``kind``, where it begins, its length."""
    decoder, begin = msgspec.json.Decoder(kind), 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield decoder.decode(line), begin, len(line)
            begin += len(line)


def _whole_bytes(path: Path) -> int:
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


def sync(path: Path) -> None:
    """Have what is there survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
