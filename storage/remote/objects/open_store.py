"""The store at a URL, once seen to work: S3 through obstore, the rest through fsspec."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping

from storage.remote.objects.fsspec_store import FsspecStore
from storage.remote.objects.object_store import ObjectStore, RemoteUnusable
from storage.remote.objects.s3_store import open_s3

FORMAT_NAME = "format"
FORMAT = b"dualpath packs 1\n"
OLD_FOLDER = "blocks"
"""Of the layout before packs: an object a block."""


def open_store(
    url: str, options: Mapping[str, object], timeout_s: float, read_only: bool = False
) -> ObjectStore:
    """The store at a URL, once it has been seen to work: unless ``read_only``, by writing to it.
    Raises :class:`RemoteUnusable`."""
    if "://" not in url:
        raise RemoteUnusable(url, "it is no URL", "for a folder, write file:///path/to/folder")
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
        raise RemoteUnusable(
            url,
            f"another version wrote it (format {found!r}; this program writes {FORMAT!r})",
            "choose another URL, or delete all below this one when nothing uses it any more",
        )


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
            "a block",
            "delete that folder, or choose another URL",
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
