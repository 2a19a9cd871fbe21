"""The completion board: words that agents write one-sidedly into an engine's memory.

One word (:mod:`common.board_word`) for each delivery. A slot is given back only when its job
has ended, that is, when no write to it can be in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from common.board_word import BOARD_WORD_BYTES, FAILED, board_word, code_for
from common.ids import BoardSlot, JobId


class BoardFull(Exception):
    """More jobs in flight than the board has words."""


class CompletionBoard:
    """``register(address, length)`` makes the words writable by other processes."""

    def __init__(self, words: int, register: Callable[[int, int], None]) -> None:
        self._words = np.zeros(words, np.uint64)
        self._free = list(range(words))
        self._lock = threading.Lock()
        register(int(self._words.ctypes.data), self._words.nbytes)

    def take(self) -> BoardSlot:
        """A slot for one job."""
        with self._lock:
            if not self._free:
                raise BoardFull(f"all {len(self._words)} completion words are in use")
            return BoardSlot(self._free.pop())

    def give_back(self, slot: BoardSlot) -> None:
        """The job of this slot has ended."""
        with self._lock:
            self._free.append(slot)

    def address(self, slot: BoardSlot) -> int:
        """Where the agent writes."""
        return int(self._words.ctypes.data) + slot * BOARD_WORD_BYTES

    def layers_delivered(self, slot: BoardSlot, job: JobId) -> int:
        """Layers of ``job`` that are in device memory; ``FAILED`` once it has failed."""
        return code_for(job, int(self._words[slot]))


class OtherBoards:
    """The boards of an engine's other ranks: ``boards`` are (session, address) of each.

    ``write(session, source, target, length)`` is a one-sided write, 0 if it succeeded.
    """

    def __init__(
        self,
        boards: list[tuple[str, int]],
        register: Callable[[int, int], None],
        write: Callable[[str, int, int, int], int],
    ) -> None:
        self._boards = boards
        self._write = write
        self._lock = threading.Lock()
        self._word = np.zeros(1, np.uint64)
        register(int(self._word.ctypes.data), self._word.nbytes)

    def fail(self, slot: BoardSlot, job: JobId) -> None:
        """A forward there need not wait for the delivery's timeout. Best effort."""
        with self._lock:
            self._word[0] = board_word(job, FAILED)
            for session_id, address in self._boards:
                target = address + slot * BOARD_WORD_BYTES
                self._write(session_id, int(self._word.ctypes.data), target, BOARD_WORD_BYTES)
