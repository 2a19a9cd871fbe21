"""SGLang's decode queues, made up, with the real hooks of a restore between their steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.decode_hicache_mixin import DecodePrefixMatch

from engine.decode.restore import Restores
from engine.sglang.decode import persist_hooks, restore_hooks
from tests.engine.parts import PAGE, Parts


class DecodeParts(Parts):
    """Of a decode engine."""

    def __init__(self, **settings: Any) -> None:
        super().__init__("decode", **settings)
        self.restores = Restores(
            self.config, self.plans, self.deliveries, self.persister, self.links, self.table
        )


class Receiver:
    """SGLang's KV receiver: P's part."""

    def __init__(self) -> None:
        self.now = KVPoll.Success

    def poll(self) -> KVPoll:
        return self.now


class Queues:
    """SGLang's decode queues: what they do in between our hooks."""

    def __init__(self, engine: DecodeParts) -> None:
        self.engine = engine
        self.tree_cache = SimpleNamespace(page_size=PAGE)
        self.token_to_kv_pool_allocator = engine.allocator
        self.req_to_token_pool = SimpleNamespace(req_to_token=engine.rows, write=self._write)
        self.queue: list = []
        self.matched_prompt: list[int] = []

    def _write(self, where, rows) -> None:
        self.engine.rows[where] = rows

    def match(self, request: Any, cached_tokens: int) -> DecodePrefixMatch:
        def original(queue, req):
            self.matched_prompt = list(req.origin_input_ids)
            cached = torch.arange(1000, 1000 + cached_tokens)
            match = DecodePrefixMatch(cached, 0, 0, None)
            return restore_hooks.after_prefix_match(match, queue, req, None)

        return restore_hooks.around_match(original, self, request)

    def admit(self, request: Any, cached_tokens: int = 0) -> SimpleNamespace:
        """From the match until the request waits for its KV."""
        match = self.match(request, cached_tokens)
        promised = match.decode_prefix_len

        def alloc_suffix(queue, req, prefix_indices, prefix_len, total_prefix_len):
            assert (prefix_len, total_prefix_len) == (match.l1_prefix_len, promised)
            return "rows of the suffix"

        prefix = match.prefix_indices
        rows = restore_hooks.around_pre_alloc(
            alloc_suffix, self, request, prefix, len(prefix), promised
        )
        assert rows == "rows of the suffix"
        request.kv.cache_protected_len = promised
        waiting = SimpleNamespace(req=request, kv_receiver=Receiver(), prefix_match=match)
        restore_hooks.before_transfer_extend(self, [waiting])
        self.queue.append(waiting)
        return waiting

    def polls(self) -> list[KVPoll]:
        pollers = restore_hooks.gated_pollers(
            lambda queue: [r.kv_receiver for r in queue.queue], self
        )
        return [poller.poll() for poller in pollers]

    def commit(self, waiting: SimpleNamespace, is_sound: bool = True) -> None:
        def original(queue, decode_req):
            # SGLang restores by itself what is promised here.
            assert not decode_req.prefix_match.needs_local_restore
            decode_req.req.finished_reason = None if is_sound else "metadata of another request"
            return "committed"

        assert restore_hooks.around_commit(original, self, waiting) == "committed"

    def join_batch(self, request: Any) -> None:
        """After the commit, and after a look at what P has sent."""
        persist_hooks.before_checkpoint(None, request, up_to=len(request.origin_input_ids))
