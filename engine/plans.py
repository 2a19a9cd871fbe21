"""Plans that the gateway has announced for requests about to arrive, and whether they fit.

A plan is a hint. Whoever acts on one asks here first whether it was made for this engine's
weights (:meth:`Plans.accepts`, :meth:`Plans.is_outdated`) and for this request's prompt
(:meth:`Plans.fit`, :meth:`Plans.fit_tail`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from common.block import BlockKey, Part, block_keys
from common.messages.from_gateway import EnginePlan
from common.page_hashes import continue_chain, namespace_seed, page_hashes
from engine.sglang.views import Request
from engine.weights import Weights

log = logging.getLogger(__name__)

PLANS_MAX = 4096


class Fit(msgspec.Struct, frozen=True):
    """Blocks of a plan that are a request's own: block ``first_block + i`` of its prompt has the
    page hash ``hashes[i]``, and the key that the plan names."""

    plan: EnginePlan
    first_block: int
    hashes: list[bytes]

    @property
    def blocks(self) -> int:
        return len(self.hashes)

    def ends_whole(self, parts: Sequence[Part]) -> bool:
        """Whether the plan's last block is among them, and each part's objects come with it."""
        blocks = len(self.plan.keys)
        needed = [len(part.needed(blocks)) for part in parts]
        readers = [len(each) for each in self.plan.part_readers]
        return self.first_block + self.blocks == blocks and readers == needed


class _Held(msgspec.Struct):
    plan: EnginePlan
    expires_at: float
    is_compared: bool = False
    """With the prompt: it is hashed once, however often it is asked about."""
    fit: Fit | None = None


class Plans:
    """By request id; bounded. Thread-safe, but for the fits: these are the scheduler's."""

    def __init__(self, weights: Weights, page_tokens: int) -> None:
        self.weights = weights
        self.page_tokens = page_tokens
        self._lock = threading.Lock()
        self._by_rid: OrderedDict[str, _Held] = OrderedDict()
        self._arrived: set[str] = set()

    def put(self, plan: EnginePlan) -> None:
        """Hold a plan; at the bound the oldest is forgotten (its request recomputes)."""
        held = _Held(plan, time.monotonic() + plan.deadline_s)
        with self._lock:
            self._by_rid[plan.rid] = held
            while len(self._by_rid) > PLANS_MAX:
                oldest, _ = self._by_rid.popitem(last=False)
                self._arrived.discard(oldest)

    def get(self, rid: str) -> EnginePlan | None:
        """The plan of a request, if there is one."""
        held = self._by_rid.get(rid)
        return held.plan if held is not None else None

    def expired(self) -> list[EnginePlan]:
        """Plans whose deadline has passed: whoever sees them has them dropped."""
        now = time.monotonic()
        with self._lock:
            return [held.plan for held in self._by_rid.values() if now > held.expires_at]

    def drop(self, rid: str) -> None:
        """The request is over."""
        with self._lock:
            self._by_rid.pop(rid, None)
            self._arrived.discard(rid)

    def arrives(self, rid: str) -> bool:
        """A request is here; whether one with a plan is not for the first time."""
        if rid not in self._by_rid:
            return False
        again = rid in self._arrived
        self._arrived.add(rid)
        return again

    # ---- does it fit? ----

    def accepts(self, plan: EnginePlan) -> bool:
        """Whether a plan was made for the weights that this engine has now."""
        return plan.namespace_digest == self.weights.digest

    def is_outdated(self, rid: str) -> bool:
        """Whether a request was planned under other weights than this engine's."""
        held = self._by_rid.get(rid)
        return held is not None and not self.accepts(held.plan)

    def is_made_up(self, rid: str) -> bool:
        """Whether a request's KV is computed from blocks that nobody delivers."""
        held = self._by_rid.get(rid)
        return held is not None and held.plan.experiment.zero_io and bool(held.plan.keys)

    def keeps_nothing(self, rid: str) -> bool:
        """Whether a request asks that nothing of it is stored."""
        held = self._by_rid.get(rid)
        return held is not None and held.plan.no_store

    def fit(self, request: Request) -> Fit | None:
        """What a request's plan holds of its prompt, from block 0 on. None where there is no
        plan, or one of other weights, or of another prompt."""
        held = self._by_rid.get(request.rid)
        if held is None or not self.accepts(held.plan):
            return None
        if not held.is_compared:
            held.fit = self._compare(held.plan, request)
            held.is_compared = True
        return held.fit

    def _compare(self, plan: EnginePlan, request: Request) -> Fit | None:
        page, bigrams = self.page_tokens, self.weights.namespace.layout.bigrams
        tokens = request.origin_input_ids[: len(plan.keys) * page + bigrams]
        hashes = page_hashes(tokens, page, request.extra_key, request.cache_salt, bigrams)
        if block_keys(self.weights.digest, hashes) != plan.keys[: len(hashes)]:
            log.warning("plan of another prompt ignored rid=%s plan=%d", plan.rid, plan.id)
            return None
        return Fit(plan, 0, hashes)

    def key_at(self, request: Request, tokens: int) -> BlockKey:
        """Of the block with which the first ``tokens`` tokens (whole pages) of a prompt end."""
        fit, page = self.fit(request), self.page_tokens
        known = fit.hashes[: tokens // page] if fit is not None else []
        seed = namespace_seed(request.extra_key, request.cache_salt)
        prior, rest = known[-1] if known else seed, request.origin_input_ids
        hashes = continue_chain(prior, rest[len(known) * page : tokens], page)
        return block_keys(self.weights.digest, [*known, *hashes][-1:])[0]

    def fit_tail(self, rid: str, hashes: list[bytes]) -> Fit | None:
        """The same where SGLang has hashed the part of the prompt that its own cache lacks:
        ``hashes`` are of consecutive pages, the first of them somewhere in the prompt."""
        held = self._by_rid.get(rid)
        if held is None or not hashes or not self.accepts(held.plan):
            return None
        keys = held.plan.keys
        (first_key,) = block_keys(self.weights.digest, hashes[:1])
        if first_key not in keys:
            return None  # the cache already has all that the plan offers
        first = keys.index(first_key)
        asked = block_keys(self.weights.digest, hashes[: len(keys) - first])
        alike = 0
        while alike < len(asked) and asked[alike] == keys[first + alike]:
            alike += 1
        return Fit(held.plan, first, hashes[:alike])
