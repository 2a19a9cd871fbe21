"""What goes wrong, when and for how long: drawn from a seed before anything starts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import msgspec

WARM_S = 5.0
"""Before the first fault."""
CALM_S = 20.0
"""Nothing new begins so long before the end: a restarted engine takes most of it."""
GAP_S = (3.0, 9.0)
"""Between the beginnings of two faults."""
LASTS_S = (1.0, 8.0)
BYTES_UNTIL = 0.5
"""Of the time: bytes are damaged in the first half only, so that whatever is missing after the
second half was lost otherwise."""


class Fault(msgspec.Struct, frozen=True):
    """One line of the schedule."""

    at_s: float
    kind: str
    """A name of ``acts.ACTS``."""
    target: str
    lasts_s: float
    seed: int
    """Of what the act itself draws."""


class Menu(NamedTuple):
    """A kind of fault: how often beside the others, and what it can be done to."""

    weight: float
    targets: Sequence[str]


BYTE_KINDS = ("flip-ssd", "tear-ssd", "flip-remote", "tear-remote")


def menus(nodes: Sequence[str]) -> dict[str, Menu]:
    """Of a cluster with these nodes."""
    agents = [f"agent-{node}" for node in nodes]
    stores = [f"agent-{node}" for node in nodes if node.startswith("d")]  # of what was decoded
    parts = [f"{node}/{part}" for node in nodes for part in ("scheduler", "detokenizer")]
    return {
        "kill": Menu(4, [*agents, *nodes, "gateway"]),
        "kill-part": Menu(1, parts),
        "kill-supervisor": Menu(0.3, ["supervisor"]),
        "suspend": Menu(4, [*agents, *nodes, *parts, "gateway", "supervisor"]),
        "kill-s3": Menu(1, ["s3"]),
        "suspend-s3": Menu(1, ["s3"]),
        "partition": Menu(2, nodes),
        "loss": Menu(2, nodes),
        "s3-answers": Menu(3, ["500", "503", "slow", "reset", "truncate", "stall"]),
        "full-disk": Menu(1, stores),
        "read-only-disk": Menu(0.7, stores),
        "flip-ssd": Menu(1, stores),
        "tear-ssd": Menu(1, stores),
        "flip-remote": Menu(1, ["s3"]),
        "tear-remote": Menu(1, ["s3"]),
        "clock": Menu(1, ["agent-d1"]),
        "hostile": Menu(3, ["requests"]),
        "weights": Menu(0.7, ["engines"]),
        "policy": Menu(1.5, ["prefill", "decode", "round-robin", "shorter-queue", "split"]),
        "drain": Menu(1.5, [*nodes, *agents]),
        "flush": Menu(1.5, ["engines"]),
    }


def make_schedule(minutes: float, seed: int, menu: Mapping[str, Menu]) -> list[Fault]:
    """In the order of time; the same for the same arguments."""
    rng = random.Random(seed)
    faults, now_s, end_s = [], WARM_S, minutes * 60 - CALM_S
    while now_s < end_s:
        kinds = [k for k in menu if k not in BYTE_KINDS or now_s < BYTES_UNTIL * minutes * 60]
        (kind,) = rng.choices(kinds, [menu[name].weight for name in kinds])
        target = rng.choice(menu[kind].targets)
        lasts_s = round(rng.uniform(*LASTS_S), 1)
        faults.append(Fault(round(now_s, 1), kind, target, lasts_s, rng.getrandbits(32)))
        now_s += rng.uniform(*GAP_S)
    return faults
