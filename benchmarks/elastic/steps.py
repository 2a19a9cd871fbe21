"""What is done to a cluster, one step after another: drawn from a seed before anything starts."""

from __future__ import annotations

import random
from collections.abc import Iterable

import msgspec

JOIN, DRAIN, KILL, GATEWAY = "join", "drain", "kill", "gateway"
KINDS = (JOIN, DRAIN, KILL, GATEWAY)
"""``launch.node`` is started; gets SIGTERM; gets SIGKILL; the gateway gets SIGKILL and is started
again as the other one's standby."""
END = "end"
"""Not drawn: SIGTERM to what is there when all is over."""
NODES = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode", "r0": "reader"}
AT_FIRST = ("p0", "d0")
HOUR_S = 3600
CLOCKS_S = {(DRAIN, "decode"): HOUR_S, (KILL, "prefill"): -HOUR_S}
"""How far the clock of a node is off that comes back after such a step: of the one that writes
blocks an hour ahead, so that it goes back by an hour when it is killed next."""


class Step(msgspec.Struct, frozen=True):
    """One of ``KINDS``."""

    kind: str
    node: str = ""
    clock_s: int = 0
    """Of a node that joins."""


def make_steps(rounds: int, seed: int) -> list[Step]:
    """All of it, ``rounds`` times; a prefill and a decode node are always there."""
    rng, steps = random.Random(seed), list[Step]()
    here = set(AT_FIRST)
    for _ in range(rounds):
        steps += [Step(JOIN, node) for node in _shuffled(rng, NODES.keys() - here)]
        chosen = {role: rng.choice(_of_role(role)) for role in sorted({*NODES.values()})}
        for kind in (DRAIN, KILL):
            for role in _shuffled(rng, chosen.keys()):
                clock_s = CLOCKS_S.get((kind, role), 0)
                steps += [Step(kind, chosen[role]), Step(JOIN, chosen[role], clock_s)]
        steps.append(Step(GATEWAY))
        leaving = [rng.choice(_of_role(role)) for role in chosen]
        steps += [Step(DRAIN, node) for node in _shuffled(rng, leaving)]
        here = NODES.keys() - set(leaving)
    return steps


def parse_step(text: str) -> Step:
    """``KIND[:NODE[:CLOCK_S]]``; raises ValueError."""
    kind, node, clock_s = (*text.split(":"), "", "")[:3]
    if kind not in KINDS or (kind != GATEWAY and node not in NODES):
        raise ValueError(f"{text}: give one of {KINDS}, and a node of {list(NODES)}")
    return Step(kind, node, int(clock_s or 0))


def _of_role(role: str) -> list[str]:
    return [node for node, its in NODES.items() if its == role]


def _shuffled(rng: random.Random, names: Iterable[str]) -> list[str]:
    found = sorted(names)
    rng.shuffle(found)
    return found
