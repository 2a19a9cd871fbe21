"""The numbers by which the tables of a folder name the owners of blocks."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Collection, Iterable

from common.block import BlockOwner
from storage.block_format import encode_owner
from storage.ssd.notes import FolderNotes
from storage.ssd.slab_table import owner_number

OWNERS_MAX = 1 << 16
"""Noted at once. Owners come with requests (a salt each), and notes of all who ever came would
grow for ever. A block whose owner is not noted any more is found by its header."""


class OwnerNumbers:
    """An owner is noted in the folder before a table names it; beyond ``OWNERS_MAX`` the half
    that was noted first goes. For any thread.

    Raises OSError where the notes cannot be read or written.
    """

    def __init__(self, notes: FolderNotes) -> None:
        self.numbers: dict[BlockOwner, int] = {}
        """Of the owners that are noted, the first one first."""
        self._notes = notes
        self._lock = threading.Lock()

    def read(self) -> None:
        """Those of earlier processes."""
        self.numbers = _numbered(self._notes.owners())

    def keep_only(self, numbers: Collection[int]) -> None:
        """Forget the owners of which no table knows a block."""
        kept = {owner: number for owner, number in self.numbers.items() if number in numbers}
        if len(kept) < len(self.numbers):
            self._notes.rewrite_owners(kept)
            self.numbers = kept

    def found(self, owners: set[BlockOwner]) -> None:
        """Durably, those that are new, however many there are."""
        if new := owners - self.numbers.keys():
            self._notes.add_owners(new)
            self.numbers |= _numbered(new)

    def note(self, owners: set[BlockOwner]) -> dict[BlockOwner, int]:
        """As :meth:`found`, within the bound; returns the numbers of these."""
        with self._lock:
            self.found(owners)
            if len(self.numbers) > OWNERS_MAX:
                later = itertools.islice(self.numbers.items(), OWNERS_MAX // 2, None)
                self.numbers = dict(later) | _numbered(owners)
                self._notes.rewrite_owners(self.numbers)
            return {owner: self.numbers[owner] for owner in owners}


def _numbered(owners: Iterable[BlockOwner]) -> dict[BlockOwner, int]:
    return {owner: owner_number(encode_owner(owner)) for owner in owners}
