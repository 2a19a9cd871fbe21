"""The numbers by which the tables of a folder name the owners of blocks."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from common.block import BlockOwner
from storage.block_format import encode_owner
from storage.ssd.notes import FolderNotes
from storage.ssd.slab_table import owner_number


class OwnerNumbers:
    """An owner is noted in the folder before a table names it. For any thread.

    Raises OSError where the notes cannot be read or written.
    """

    def __init__(self, notes: FolderNotes) -> None:
        self.numbers: dict[BlockOwner, int] = {}
        """Of the owners that are noted."""
        self._notes = notes
        self._lock = threading.Lock()

    def read(self) -> None:
        """Those of earlier processes."""
        self._know(self._notes.owners())

    def note(self, owners: set[BlockOwner]) -> None:
        """Durably, those that are new."""
        with self._lock:
            if new := owners - self.numbers.keys():
                self._notes.add_owners(new)
                self._know(new)

    def _know(self, owners: Iterable[BlockOwner]) -> None:
        self.numbers |= {owner: owner_number(encode_owner(owner)) for owner in owners}
