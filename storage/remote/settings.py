"""How the remote tier packs, keeps and reads blocks."""

from __future__ import annotations

import msgspec


class RemoteSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Zero switches a bound off."""

    threads: int = 16
    """Requests for reads at once; half as many uploads."""
    timeout_s: float = 20.0
    """A block that has made no progress for so long fails."""
    pack_bytes: int = 64 << 20
    """A pack is closed at this size, ..."""
    linger_s: float = 1.0
    """... or when its first block has waited so long."""
    capacity_bytes: int = 0
    """Of all packs below the URL, whoever wrote them; the oldest go first."""
    ttl_s: float = 0.0
    """Blocks go when they were written so long ago."""
    hedge_after_s: float = 0.0
    """A read is asked for a second time after that; 0 switches it off."""
    refresh_s: float = 30.0
    """Between looks at what others have uploaded, if no read asks for one."""
    upkeep_s: float = 60.0
    """Between compactions, by whichever agent begins first."""
    index_blocks_max: int = 4_000_000
    """Blocks known at once, about 350 bytes each; beyond that the oldest packs are not used."""
