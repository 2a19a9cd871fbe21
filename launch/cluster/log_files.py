"""A process's log: put aside at the start, and whenever it has grown large."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from common.user_files import close_to_others, private

log = logging.getLogger(__name__)

LOOK_S = 1.0


class LogFile:
    """``NAME.log``, beside ``NAME.log.1`` (the latest that was put aside) and so on."""

    def __init__(self, path: Path, bytes_max: int, kept: int) -> None:
        self.path = path
        self._bytes_max = bytes_max
        self._kept = kept

    def begin(self) -> None:
        """The last run's stays readable beside this one's."""
        if self.path.exists():
            self._make_room()
            self.path.replace(self._aside(1))
        close_to_others(path for n in range(1, self._kept + 1) if (path := self._aside(n)).exists())

    def trim(self) -> None:
        """Put the log aside if it is large. Its process has the file open and goes on appending to
        it, so it is copied and emptied: what is written in between, microseconds, is lost."""
        try:
            if not self._bytes_max or not self.path.exists():  # its process has not begun
                return
            if self.path.stat().st_size < self._bytes_max:
                return
            copy = self._copied()
            self._make_room()
            copy.replace(self._aside(1))
            os.truncate(self.path, 0)
        except OSError as error:  # a full disk: the process's own writes fail alike
            log.warning("not put aside: %s: %s", self.path, error)

    def _copied(self) -> Path:
        """Its copy, which takes no other's place before it is whole."""
        copy = self.path.with_suffix(".log.new")
        copy.unlink(missing_ok=True)
        try:
            with self.path.open("rb") as log_file, open(copy, "xb", opener=private) as file:
                shutil.copyfileobj(log_file, file)
        except OSError:
            copy.unlink(missing_ok=True)
            raise
        return copy

    def _aside(self, number: int) -> Path:
        return self.path.with_suffix(f".log.{number}")

    def _make_room(self) -> None:
        for number in range(self._kept - 1, 0, -1):
            if (older := self._aside(number)).exists():
                older.replace(self._aside(number + 1))


async def keep_small(logs: Sequence[LogFile]) -> None:
    """Trim them for ever."""
    while True:
        for one in logs:
            await asyncio.to_thread(one.trim)
        await asyncio.sleep(LOOK_S)
