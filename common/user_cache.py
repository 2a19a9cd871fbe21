"""What engines keep in the user's cache folder, so that the next start need not find it out."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``dualpath`` in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dualpath"


def keep(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all. In a read-only home there will be none: what it
    would have held is found out again at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_bytes(content)
        temporary.rename(path)
    except OSError:
        return
