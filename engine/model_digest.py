"""Digest of a model's config and weights: what makes two engines' KV interchangeable.

A path or a served name proves nothing (another model can be put under the same one), so
the bytes are hashed: config and weight files, with xxh3-128, at disk speed. The result is
remembered beside the user's cache under the files' sizes and times, so that a large model is
read for this only once. Beside the time of the last modification, which anyone may set, it is
the time of the last change of the inode, which the kernel alone sets.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import xxhash

from common.user_files import cache_folder, keep

log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class NoWeights(Exception):
    """The folder holds no weight file."""


class FilesChanged(Exception):
    """While they were read: the digest would be of no state they were in."""


def model_digest(model: Path) -> str:
    """Hex digest of ``config.json`` and every weight file of a model folder."""
    return _digest_of(_model_files(model))


def _model_files(model: Path) -> list[Path]:
    files = [model / "config.json"]
    files += sorted(f for pattern in _WEIGHTS for f in model.glob(pattern))
    if len(files) < 2 or not files[0].exists():
        raise NoWeights(f"{model} holds no config.json with weights beside it")
    return files


class FolderReading:
    """The digest of a model folder that somebody loads, taken beside that in a thread of its own.
    It counts only if the files were the same ones all the while."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._before = _stamp_of_model(model)
        self._after = ""
        self._then: Callable[[str], None] | None = None
        self._is_loaded = threading.Event()
        threading.Thread(target=self._read, name="dualpath-digest", daemon=True).start()

    def loaded(self, then: Callable[[str], None]) -> None:
        """``then`` is called with the digest, from the thread; with "" if there is none."""
        self._after = _stamp_of_model(self._model)
        self._then = then
        self._is_loaded.set()

    def failed(self) -> None:
        """The folder was not loaded."""
        self._is_loaded.set()

    def _read(self) -> None:
        digest = ""
        if self._before:
            try:
                files = _model_files(self._model)
                digest = _digest_of(files) if _stamp(files) == self._before else ""
            except (NoWeights, FilesChanged, OSError) as error:
                log.warning("weights without a digest folder=%s: %s", self._model, error)
        self._is_loaded.wait()
        if self._then is not None:
            self._then(digest if self._after == self._before else "")


def _stamp_of_model(model: Path) -> str:
    """What changes with the files; empty if there are none."""
    try:
        return _stamp(_model_files(model))
    except (NoWeights, OSError):
        return ""


def contents_digest(path: Path) -> str:
    """Hex digest of a file, or of all files below a folder with their names."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return _digest_of(files)


def _digest_of(files: Sequence[Path]) -> str:
    stamp = _stamp(files)
    remembered = cache_folder() / "digests" / stamp
    if remembered.exists():
        return remembered.read_text()
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(_file_digest(file))
    if _stamp(files) != stamp:
        raise FilesChanged(f"{files[0]} and those beside it are being written")
    keep(remembered, digest.hexdigest().encode())
    return digest.hexdigest()


def _stamp(files: Sequence[Path]) -> str:
    return hashlib.sha256(json.dumps([_identity(f) for f in files]).encode()).hexdigest()


def _identity(file: Path) -> list[str | int]:
    status = file.resolve().stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return [str(file.resolve()), status.st_size, *times, status.st_ino]


def _file_digest(file: Path) -> bytes:
    hasher = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.digest()
