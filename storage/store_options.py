"""How the tiered store admits, keeps and writes blocks."""

from __future__ import annotations

import msgspec


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The policies are named in :mod:`storage.write_behind`."""

    write_queue_blocks: int = 1024
    """Written behind at once; more are skipped."""
    plans_max: int = 4096
    """Waiting for slots; more are refused."""
    hold_s: float = 600.0
    """For which a settled plan's blocks stay pinned at most."""
    keep_in_dram: bool = True
    """False: what nobody needs is dropped at once, so every hit is read."""
    write_policy: str = "everywhere"
    promotion_policy: str = "always"
