"""Who reads what of as much of a request's hit as is worth loading."""

from __future__ import annotations

import math

import msgspec

from scheduler.cluster_state import ClusterState
from scheduler.hit import Hit, Work
from scheduler.load_policy import LoadEstimate, worth_loading
from scheduler.parts import Hits
from scheduler.plan import PlanRequest, Range
from scheduler.policies import ReadPolicy, experiment_of
from scheduler.rows.processes import Agents

SHORTER_MAX = 4
"""Shorter hits that are tried where readers cannot have all parts of a longer one."""


class Assignment(msgspec.Struct, frozen=True):
    """The readers of a hit, what is asked of them, and why the hit is no longer."""

    ranges: list[Range]
    work: Work
    hit: Hit
    """Of which ``ranges`` are; with parts, all of it."""
    load: LoadEstimate | None = None
    """None where nothing was weighed."""


def assign(
    policy: ReadPolicy, hits: Hits, request: PlanRequest, prefill: int, state: ClusterState
) -> Assignment:
    """``prefill``: row of the engine that computes the rest."""
    load_policy, whole = state.options.load_policy, hits.whole
    if not whole.runs or load_policy == "never":
        return Assignment([], Work.of(whole, [], state), whole)
    hit, ranges = _read_all(policy, hits, whole.blocks, state)
    work = Work.of(hit, ranges, state)
    if experiment_of(policy).zero_io:
        return Assignment(ranges, Work.of(hit, [], state), hit)
    if not ranges or load_policy == "always":
        return Assignment(ranges, work, hit)
    blocks = hit.blocks if hit.extras else ranges[-1].first + ranges[-1].blocks
    start_s = work.ends_s - work.added / state.bytes_per_s[work.rows]
    first_s = float(start_s.min(where=work.added > 0, initial=math.inf))
    load = worth_loading(state, request, prefill, blocks, first_s, float(work.ends_s.max()))
    if load.load_blocks < blocks:
        hit, ranges = _read_all(policy, hits, load.load_blocks, state)
        work = Work.of(hit, ranges, state)
    return Assignment(ranges, work, hit, load)


def _read_all(
    policy: ReadPolicy, hits: Hits, blocks: int, state: ClusterState
) -> tuple[Hit, list[Range]]:
    """The longest hit of up to so many blocks that has readers. Without parts a prefix of it will
    do; what has parts has to be whole."""
    for _ in range(SHORTER_MAX):
        hit = hits.at_most(blocks)
        ranges = _within_slots(policy.assign(hit, state), state.agents) if hit.runs else []
        covered = sum(part.blocks for part in ranges)
        if not hit.extras or covered == hit.items:
            return hit, ranges
        blocks = hit.blocks - max(1, hit.items - covered)
    return hits.at_most(0), []


def _within_slots(ranges: list[Range], agents: Agents) -> list[Range]:
    """End the hit where a reader's share would exceed its DRAM: it is held as a whole."""
    left: dict[str, float] = {}
    for index, part in enumerate(ranges):
        room = left.get(part.agent)
        if room is None:
            room = float(agents.dram_slots[agents.row_of[part.agent]])
        if part.blocks > room:
            last = msgspec.structs.replace(part, blocks=int(room))
            return [*ranges[:index], last] if room else ranges[:index]
        left[part.agent] = room - part.blocks
    return ranges
