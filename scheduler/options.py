"""What an operator may set of the scheduler."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta

LoadPolicy = Literal["auto", "always", "never"]
LOAD_POLICIES: tuple[str, ...] = get_args(LoadPolicy)


class SchedulerOptions(msgspec.Struct, frozen=True):
    """Constants of the paper (arXiv 2602.21548, section 6.1) and our own, with its defaults."""

    load_policy: Annotated[
        LoadPolicy,
        Meta(
            description="Whether a hit is loaded or computed again; auto is whatever gives the "
            "first token sooner."
        ),
    ] = "auto"
    heartbeat_timeout_s: float = 5.0
    """An engine or agent silent for longer is not used."""
    alpha_s: float = 3.0
    beta_s: float = 5.0
    alpha_bytes: Annotated[
        int,
        Meta(
            description="A node's read queue is short up to here; 0 means what its storage NIC "
            "reads in 3 s."
        ),
    ] = 0
    """0: in ``alpha_s``."""
    beta_tokens: Annotated[
        int,
        Meta(
            description="Prompt tokens that may wait at a prefill engine; 0 means what it computes "
            "in 5 s."
        ),
    ] = 0
    """0: in ``beta_s``."""
    decode_balance: float = 1.05
    """Z: decode engines up to this multiple of their group's mean tokens are preferred."""
    readers_max: int = 8
    """Agents that share one request's read."""
    range_min_blocks: int = 4
    """No agent is asked for fewer blocks, unless nobody else can read them."""
    directory_entries_max: int = 10_000_000
    decisions_kept: int = 1000
    """Plans that can be explained afterwards."""
