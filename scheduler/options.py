"""What an operator may set of the scheduler."""

from __future__ import annotations

from typing import Literal

import msgspec

LoadPolicy = Literal["auto", "always", "never"]


class SchedulerOptions(msgspec.Struct, frozen=True):
    """Constants of the paper (arXiv 2602.21548, section 6.1) and our own, with its defaults."""

    load_policy: LoadPolicy = "auto"
    heartbeat_timeout_s: float = 5.0
    """An engine or agent silent for longer is not used."""
    alpha_s: float = 3.0
    beta_s: float = 5.0
    alpha_bytes: int = 0
    """A read queue is short up to here; 0: what the agent reads in ``alpha_s``."""
    beta_tokens: int = 0
    """A prefill engine is full beyond; 0: what it computes in ``beta_s``."""
    decode_balance: float = 1.05
    """Z: decode engines up to this multiple of their group's mean tokens are preferred."""
    readers_max: int = 8
    """Agents that share one request's read."""
    range_min_blocks: int = 4
    """No agent is asked for fewer blocks, unless nobody else can read them."""
    directory_entries_max: int = 10_000_000
    decisions_kept: int = 1000
    """Plans that can be explained afterwards."""
