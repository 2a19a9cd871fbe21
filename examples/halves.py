"""A path policy of your own: who reads which blocks of a hit.

    python -m launch.cluster --path-policy examples.halves:Halves

A policy is a class that is built without arguments, with one method (``scheduler/policies.py``).
This one has the prefill engine's agent read the first half of each hit, which the forward needs
first, and the decode engine's agent the second: both storage NICs work, whatever their queues.
``split`` is the policy that looks at the queues too.
"""

from __future__ import annotations

from collections.abc import Iterator

from scheduler.cluster_state import ClusterState
from scheduler.directory.directory import Run
from scheduler.hit import Hit
from scheduler.one_reader import holder, until_none
from scheduler.plan import Range


class Halves:
    """One for each side."""

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        """A hit is runs of blocks that the same agents hold. The ranges must cover it from its
        start; where they end, the rest is computed again."""
        half = hit.blocks // 2
        runs = [part for run in hit.runs for part in cut(run, half)]
        sides = [hit.prefill_agent if run.first < half else hit.decode_agent for run in runs]
        readers = [reader(run, side, hit, state) for run, side in zip(runs, sides, strict=True)]
        return until_none(zip(runs, readers, strict=True))


def reader(run: Run, side: str, hit: Hit, state: ClusterState) -> str | None:
    """``side`` if it lives and can have the blocks; else who holds them; None: nobody."""
    if side in hit.alive and run.holders.tier_at(side) is not None:
        return side
    return holder(run.holders, state)


def cut(run: Run, at: int) -> Iterator[Run]:
    """What lies before block ``at`` of the hit, and what from there on."""
    end = run.first + run.blocks
    if run.first < at < end:
        yield Run(run.first, at - run.first, run.holders)
        yield Run(at, end - at, run.holders)
    else:
        yield run
