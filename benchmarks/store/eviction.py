"""The order of eviction on a trace of conversations, beside LRU and Belady's rule.

A request hits the leading blocks of its prompt that are held; then all of its blocks are.
The trace's blocks have 512 tokens. LRU uses a prompt's blocks from the first to the last.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from benchmarks.goals import Goal
from benchmarks.trace import load_trace
from common.block import NO_PARENT, BlockKey
from storage.index.index import BlockIndex

TRACE = Path(__file__).parents[1] / "traces" / "mooncake_conversation.jsonl.xz"
PARTS = {"1 %": 0.01, "5 %": 0.05, "20 %": 0.20}
"""Of the working set, which is every block of the trace."""
ROOM_POINTS = 1.0
"""Where Belady's rule is no further above LRU, there is no room."""

Prompts = Sequence[Sequence[BlockKey]]
HitRates = dict[str, dict[str, float]]


def measure_eviction(trace: Path = TRACE) -> HitRates:
    """Hit rate in percent by part of the working set and by rule."""
    prompts = _prompts(trace)
    blocks = len({key for prompt in prompts for key in prompt})
    uses = sum(map(len, prompts))
    rules: dict[str, Callable[[Prompts, int], int]]
    rules = {"leaf first": leaf_first_hits, "LRU": lru_hits, "Belady": belady_hits}
    return {
        part: {
            name: 100 * hits(prompts, max(1, int(share * blocks))) / uses
            for name, hits in rules.items()
        }
        for part, share in PARTS.items()
    }


def _prompts(trace: Path) -> list[list[BlockKey]]:
    return [
        [BlockKey(hashlib.sha256(b"%d" % number).digest()) for number in request.hash_ids]
        for request in load_trace(trace)
    ]


def leaf_first_hits(prompts: Prompts, capacity: int) -> int:
    """Blocks found by the order that DRAM and SSD have (:mod:`storage.index.index`)."""
    index, hits = BlockIndex(), 0
    for prompt in prompts:
        hits += sum(1 for _ in takewhile(index.__contains__, prompt))
        index.touch(prompt)
        for parent, key in zip([NO_PARENT, *prompt], prompt, strict=False):
            if key not in index:
                index.add(key, 0, parent)
        victims = index.victims(lambda key: True)
        while len(index) > capacity:
            index.pop(next(victims))
    return hits


def lru_hits(prompts: Prompts, capacity: int) -> int:
    """Blocks found by plain LRU."""
    held: OrderedDict[BlockKey, None] = OrderedDict()
    hits = 0
    for prompt in prompts:
        hits += sum(1 for _ in takewhile(held.__contains__, prompt))
        for key in prompt:
            held[key] = None
            held.move_to_end(key)
            if len(held) > capacity:
                held.popitem(last=False)
    return hits


def belady_hits(prompts: Prompts, capacity: int) -> int:
    """Blocks found if what is used again last, or never, goes first: no rule does better."""
    never = len(prompts)
    next_uses, later = [], dict[BlockKey, int]()
    for number in range(never - 1, -1, -1):
        next_uses.append([later.get(key, never) for key in prompts[number]])
        later |= dict.fromkeys(prompts[number], number)
    held: dict[BlockKey, int] = {}
    order: list[tuple[int, BlockKey]] = []
    hits = 0
    for prompt, uses in zip(prompts, reversed(next_uses), strict=True):
        hits += sum(1 for _ in takewhile(held.__contains__, prompt))
        for key, use in zip(prompt, uses, strict=True):
            held[key] = use
            heapq.heappush(order, (-use, key))
        while len(held) > capacity:
            use, key = heapq.heappop(order)
            if held.get(key) == -use:
                del held[key]
    return hits


def eviction_goals(rates: HitRates) -> list[Goal]:
    """Never much under LRU, and above it where Belady's rule shows that one can be."""
    goals = []
    for part, of in rates.items():
        name = f"hit rate under LRU's at {part} of the working set"
        goals.append(Goal(name, of["LRU"] - of["leaf first"], "points", at_most=0.5))
        if of["Belady"] - of["LRU"] > ROOM_POINTS:
            name = f"hit rate above LRU's at {part} of the working set"
            goals.append(Goal(name, of["leaf first"] - of["LRU"], "points", at_least=0.01))
    return goals
