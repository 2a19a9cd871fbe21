"""How the remote tier packs, keeps and reads blocks."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta


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
    capacity_bytes: Annotated[
        int,
        Meta(
            description="Remote tier: bound of all that lies below the URL, whoever wrote it; "
            "0 means none."
        ),
    ] = 0
    """The oldest packs go first."""
    ttl_s: Annotated[
        float,
        Meta(description="Remote tier: blocks go so long after they were written; 0: never."),
    ] = 0.0
    hedge_after_s: Annotated[
        float,
        Meta(
            description="Remote tier: a read with no answer by then is asked for a second time; "
            "0: never."
        ),
    ] = 0.0
    refresh_s: float = 30.0
    """Between looks at what others have uploaded, if no read asks for one."""
    upkeep_s: float = 60.0
    """Between compactions, by whichever agent begins first."""
    index_blocks_max: int = 4_000_000
    """Blocks known at once, about 350 bytes each; beyond that the oldest packs are not used."""
