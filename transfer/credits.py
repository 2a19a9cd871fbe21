"""Credits: how far an agent may write into the KV memory of an engine that reuses it.

A prefill engine with a layer window (:mod:`engine.prefill.layer_ring`) holds KV of a few layers and
numbers the layers of all its forwards: *positions*. Each of its ranks writes one word
one-sidedly into each agent's memory: every position before it may be written. So a writer
learns that a buffer is free without a message, and the engine's forward never waits for one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from common.ids import Incarnation

WORDS = 4096
WORD_BYTES = 8
POSITION_BITS = 48


def credit_tag(incarnation: Incarnation) -> int:
    """Of an engine's incarnation, in the upper bits of its words."""
    return incarnation & 0xFFFF


def credit_word(tag: int, until: int) -> int:
    """The word that allows every position before ``until``."""
    return tag << POSITION_BITS | until


class CreditWord:
    """The word of one rank of one incarnation of an engine, which marks it with its ``tag``."""

    def __init__(self, words: np.ndarray, index: int, tag: int) -> None:
        self._words = words
        self._index = index
        self._tag = tag
        self._until = 0
        self.address = int(words.ctypes.data) + index * WORD_BYTES

    def allows(self, position: int) -> bool:
        """Whether a position may be written. Late writes, of a smaller value or of an incarnation
        that is dead, neither allow anything nor take anything back."""
        word = int(self._words[self._index])
        if word >> POSITION_BITS == self._tag:
            self._until = max(self._until, word & ((1 << POSITION_BITS) - 1))
        return self._until > position


class CreditBoard:
    """``register(address, length)`` makes the words writable by other processes.

    Words are given out in turn, so that what two engines' incarnations with the same tag write
    does not meet.
    """

    def __init__(self, register: Callable[[int, int], None]) -> None:
        self._words = np.zeros(WORDS, np.uint64)
        self._next = 0
        register(int(self._words.ctypes.data), self._words.nbytes)

    def take(self, ranks: int = 1, tag: int = 0) -> list[CreditWord]:
        """A word for each rank, one after the other, that allow nothing yet."""
        first = self._next if self._next + ranks <= WORDS else 0
        self._next = first + ranks
        self._words[first : first + ranks] = 0
        return [CreditWord(self._words, index, tag) for index in range(first, first + ranks)]
