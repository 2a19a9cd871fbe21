"""Where packs lie: objects below a URL, through fsspec or, for S3, through obstore."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from storage.block_format import Buffer

_VISIBLE_AS_A_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"}
"""Protocols whose uploads appear complete or not at all; others need a rename."""
TEMPORARY_SUFFIX = ".tmp"
FORMAT_NAME = "format"
FORMAT = b"dualpath packs 1\n"
OLD_FOLDER = "blocks"
"""Of the layout before packs: an object a block."""


class RemoteUnusable(Exception):
    """The remote URL cannot be used."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"cannot keep blocks at {url}: {reason}")
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


class FsspecStore:
    """Any file system that fsspec knows."""

    def __init__(self, filesystem: AbstractFileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = root
        protocol = filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._visible_as_a_whole = bool(protocols & _VISIBLE_AS_A_WHOLE)

    @classmethod
    def open(cls, url: str, options: dict[str, Any]) -> FsspecStore:
        """Raises :class:`RemoteUnusable`."""
        if url.partition("://")[0] in ("file", "local"):
            options = {"auto_mkdir": True, **options}
        try:
            filesystem, root = url_to_fs(
                url, **{"use_listings_cache": False, "skip_instance_cache": True, **options}
            )
        except (ValueError, TypeError, ImportError) as error:
            raise RemoteUnusable(url, str(error)) from error
        return cls(filesystem, root.rstrip("/"))

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def read(self, path: str, start: int, nbytes: int) -> Buffer:
        data: bytes = self._filesystem.cat_file(self._full(path), start=start, end=start + nbytes)
        return data

    def write(self, path: str, parts: Iterable[Buffer]) -> None:
        full = self._full(path)
        if self._visible_as_a_whole:
            self._filesystem.pipe_file(full, b"".join(parts))
            return
        temporary = f"{full}.{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        try:
            with self._filesystem.open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
            self._filesystem.mv(temporary, full)
        except BaseException:
            self._remove(temporary)
            raise

    def create(self, path: str, data: bytes) -> bool:
        full = self._full(path)
        try:
            self._filesystem.pipe_file(full, data, mode="create")
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError):  # a file system without conditional writes
            self._filesystem.pipe_file(full, data)
        except OSError:  # s3fs on Ceph answers "invalid argument"
            if self._filesystem.exists(full):
                return False
            raise
        return True

    def list(self, folder: str) -> list[StoredObject]:
        try:
            found = self._filesystem.find(self._full(folder), detail=True)
        except FileNotFoundError:
            return []
        skipped = len(self._root) + 1
        return [StoredObject(name[skipped:], info["size"]) for name, info in found.items()]

    def delete(self, path: str) -> None:
        self._remove(self._full(path))

    def _remove(self, full: str) -> None:
        try:
            self._filesystem.rm_file(full)
        except FileNotFoundError:
            pass


def open_store(
    url: str, options: dict[str, Any], timeout_s: float, read_only: bool = False
) -> ObjectStore:
    """The store at a URL, once it has been seen to work: unless ``read_only``, by writing to it.
    Raises :class:`RemoteUnusable`."""
    if "://" not in url:
        raise RemoteUnusable(url, "it is no URL; for a folder, write file:///path/to/folder")
    from storage.s3_store import open_s3

    opened = open_s3(url, options, timeout_s) or FsspecStore.open(url, options)
    probe = _look_for_format if read_only else _probe
    _in_time(url, timeout_s, lambda: probe(url, opened))
    return opened


def _look_for_format(url: str, store: ObjectStore) -> None:
    """Raises :class:`RemoteUnusable` if these are not packs that this program reads."""
    try:
        found = bytes(store.read(FORMAT_NAME, 0, 100))
    except FileNotFoundError as error:
        raise RemoteUnusable(url, f"it holds no store (no object {FORMAT_NAME!r})") from error
    if found != FORMAT:
        raise RemoteUnusable(url, f"it holds the format {found!r}, this program {FORMAT!r}")


def _probe(url: str, store: ObjectStore) -> None:
    """Write, list, read and delete a small object, and look at the format."""
    path = f"probe/{uuid.uuid4().hex}"
    store.write(path, [b"dualpath"])
    try:
        if path not in {found.path for found in store.list("probe")}:
            raise OSError("an object that was written is not in the listing")
        if bytes(store.read(path, 4, 4)) != b"path":
            raise OSError("an object does not read back as it was written")
    finally:
        store.delete(path)
    if not store.create(FORMAT_NAME, FORMAT):
        _look_for_format(url, store)
    elif any(True for _ in store.list(OLD_FOLDER)):
        store.delete(FORMAT_NAME)
        raise RemoteUnusable(
            url,
            f"the folder {OLD_FOLDER!r} below it has the layout of an earlier version, an object "
            "a block: delete it, or choose another URL",
        )


def _in_time(url: str, timeout_s: float, check: Callable[[], None]) -> None:
    errors: list[Exception | None] = []

    def run() -> None:
        try:
            check()
        except Exception as error:  # whatever it is, it is the reason that the operator reads
            errors.append(error)
        else:
            errors.append(None)

    thread = threading.Thread(target=run, name="remote-probe", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not errors:
        raise RemoteUnusable(url, f"no answer within {timeout_s:g} s")
    if isinstance(errors[0], RemoteUnusable):
        raise errors[0]
    if errors[0] is not None:
        reason = str(errors[0]).partition("\n\nDebug source")[0]
        raise RemoteUnusable(url, f"{type(errors[0]).__name__}: {reason}") from errors[0]
