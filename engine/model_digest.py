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
from collections.abc import Sequence
from pathlib import Path

import xxhash

from common.user_files import cache_folder, keep

_CHUNK_BYTES = 8 << 20
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


class NoWeights(Exception):
    """The folder holds no weight file."""


def model_digest(model: Path) -> str:
    """Hex digest of ``config.json`` and every weight file of a model folder."""
    files = [model / "config.json"]
    files += sorted(f for pattern in _WEIGHTS for f in model.glob(pattern))
    if len(files) < 2 or not files[0].exists():
        raise NoWeights(f"{model} holds no config.json with weights beside it")
    return _digest_of(files)


def contents_digest(path: Path) -> str:
    """Hex digest of a file, or of all files below a folder with their names."""
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    return _digest_of(files)


def _digest_of(files: Sequence[Path]) -> str:
    stamp = hashlib.sha256(json.dumps([_identity(f) for f in files]).encode()).hexdigest()
    remembered = cache_folder() / "digests" / stamp
    if remembered.exists():
        return remembered.read_text()
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        digest.update(_file_digest(file))
    keep(remembered, digest.hexdigest().encode())
    return digest.hexdigest()


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
