"""Where packs lie: what is asked of a store of objects below a URL."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from storage.block_format import Buffer

TEMPORARY_SUFFIX = ".tmp"
"""Of objects that are not whole yet."""


class RemoteUnusable(Exception):
    """The remote URL cannot be used; ``advice`` says what to do."""

    def __init__(
        self, url: str, reason: str, advice: str = "check the URL and the options for it"
    ) -> None:
        super().__init__(f"cannot keep blocks at {url}: {reason}; {advice}")
        self.url = url
        self.reason = reason


class StoredObject(NamedTuple):
    """One entry of a listing; ``path`` is relative to the URL."""

    path: str
    nbytes: int


class ObjectStore(Protocol):
    """Objects below one URL. Every call blocks, and may be made from any thread.

    Raises FileNotFoundError, PermissionError, or whatever the store's library raises for
    errors that may pass.
    """

    def read(self, path: str, start: int, nbytes: int) -> Buffer:
        """A range; shorter, even empty, if the object ends before."""

    def write(self, path: str, parts: Iterable[Buffer]) -> None:
        """A new object of these bytes, visible as a whole; each part is taken when it can
        be sent. ``path`` must be one that nobody else writes."""

    def create(self, path: str, data: bytes) -> bool:
        """A new small object; False if there is one. Where the store cannot tell, the last
        writer wins."""

    def list(self, folder: str) -> list[StoredObject]:
        """Everything below a folder; ``""`` is the URL itself."""

    def delete(self, path: str) -> None:
        """Nothing happens if it is gone already."""
