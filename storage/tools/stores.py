"""Opens a store by its folder or URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from storage.tiers.contract import Tier
from storage.tools.remote_view import RemoteView, open_remote_tier
from storage.tools.ssd_view import SsdView, open_ssd_tier
from storage.tools.view import StoreUnusable, StoreView


def open_view(url: str, options: Mapping[str, object]) -> StoreView:
    """The store in a folder or at a URL; raises :class:`StoreUnusable`."""
    if _is_remote(url):
        return RemoteView(url, options)
    return SsdView(Path(url.removeprefix("ssd://")))


def _is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("ssd://")


def open_target(url: str, options: Mapping[str, object], capacity_bytes: int) -> Tier:
    """A tier to write to, made if it is not there; raises :class:`StoreUnusable`."""
    if _is_remote(url):
        return open_remote_tier(url, options)
    folder = Path(url.removeprefix("ssd://"))
    if any(folder.glob("*.slab")):
        return open_view(url, options).open_tier(capacity_bytes)
    if not capacity_bytes:
        raise StoreUnusable(f"{folder} is new: say with --capacity how large it may become")
    return open_ssd_tier(folder, capacity_bytes)
