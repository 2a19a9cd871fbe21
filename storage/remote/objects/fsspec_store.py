"""Objects in any file system that fsspec knows."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping

from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from storage.block_format import Buffer
from storage.remote.objects.object_store import TEMPORARY_SUFFIX, RemoteUnusable, StoredObject

_VISIBLE_AS_A_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"}
"""Protocols whose uploads appear complete or not at all; others need a rename."""


class FsspecStore:
    """Any file system that fsspec knows."""

    def __init__(self, filesystem: AbstractFileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = root
        protocol = filesystem.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._visible_as_a_whole = bool(protocols & _VISIBLE_AS_A_WHOLE)

    @classmethod
    def open(cls, url: str, options: Mapping[str, object]) -> FsspecStore:
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
        except BaseException:  # nobody would ever look at the half of it
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
