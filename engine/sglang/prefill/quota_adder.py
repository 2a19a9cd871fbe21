"""Batches packed to the quota.

SGLang's ``PrefillAdder`` (managers/schedule_policy.py) takes requests from the waiting queue
into a batch, up to ``--chunked-prefill-size`` new tokens. Here each request is first cut to
what ``scheduler/quota.py`` leaves it; everything else, SGLang's own bounds included, stays
SGLang's.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder

from engine.runtime import runtime, runtime_if_up
from engine.sglang.border import Use
from scheduler.quota import Chunk

_ADDER = "managers.schedule_policy.PrefillAdder."
_REQUEST = "managers.schedule_batch.Req."
USES = (
    Use("managers.schedule_policy.PrefillAdder", "extended by the quota"),
    Use("managers.schedule_policy.AddReqResult.CONTINUE", "there is room for another request"),
    Use("managers.schedule_policy.AddReqResult.OTHER", "the batch is full, for reasons of ours"),
    Use(_ADDER + "budget_state", "asked before each request; extended"),
    Use(
        _ADDER + "add_chunked_req",
        "takes the request that the last batch cut; cuts it to `chunked_req_limit`",
    ),
    Use(
        _ADDER + "add_one_req",
        "takes a request, and cuts it to `rem_chunk_tokens`: both lowered meanwhile",
        keywords=("req", "has_chunked_req", "truncation_align_size"),
    ),
    Use(_ADDER + "rem_chunk_tokens", "new tokens that still fit into the batch"),
    Use(_ADDER + "chunked_req_limit", "new tokens of the request that was cut, or None"),
    Use(_ADDER + "ceil_paged_tokens", "whole pages"),
    Use(_ADDER + "can_run_list", "the requests taken so far"),
    Use(_REQUEST + "full_untruncated_fill_ids", "the prompt, all of it"),
    Use(_REQUEST + "prefix_len", "tokens that are there"),
    Use(_REQUEST + "host_hit_length", "tokens that are about to be loaded"),
    Use(_REQUEST + "extend_end", "where it was cut"),
    Use(_REQUEST + "extend_len", "new tokens that the batch takes of it"),
)


class QuotaPrefillAdder(PrefillAdder):
    """One pass of SGLang's scheduler over its waiting queue."""

    rem_chunk_tokens: int
    chunked_req_limit: int | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        quota = runtime().prefill_timing.quota
        assert quota is not None
        self._quota, self._batch = quota, quota.new_batch()

    def budget_state(self) -> AddReqResult:
        """Asked before each request: OTHER ends the batch."""
        state = super().budget_state()
        spent = state is AddReqResult.CONTINUE and self._batch.closed
        return AddReqResult.OTHER if spent else state

    def add_chunked_req(self, req: Any) -> Any:
        """The request that the last batch cut goes first; returns it if it is cut again."""
        room = self._batch.room(req.prefix_len, _prompt_tokens(req) - req.prefix_len)
        self.chunked_req_limit = min(room, self.chunked_req_limit or room)
        count = len(self.can_run_list)
        rest = super().add_chunked_req(req)
        self._note_added(count)
        return rest

    def add_one_req(
        self, req: Any, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        """A request of the waiting queue: all of it, its first pages, or nothing."""
        context = req.prefix_len + req.host_hit_length
        new = _prompt_tokens(req) - context
        room = self._batch.room(context, new)
        if truncation_align_size is not None and room < new:
            least = 0 if self._batch.chunks else 1
            room = max(least, room // truncation_align_size) * truncation_align_size
        # SGLang keeps track of one cut request only.
        if room == 0 or (room < new and has_chunked_req):
            return AddReqResult.OTHER
        count, left = len(self.can_run_list), self.rem_chunk_tokens
        self.rem_chunk_tokens = lent = min(left, self.ceil_paged_tokens(room))
        result = super().add_one_req(req, has_chunked_req, truncation_align_size)
        self.rem_chunk_tokens = left - (lent - self.rem_chunk_tokens)
        return self.budget_state() if self._note_added(count) else result

    def _note_added(self, count: int) -> bool:
        """Charge the request that joined, if one did."""
        if len(self.can_run_list) == count:
            return False
        req = self.can_run_list[-1]
        is_cut = req.extend_end < _prompt_tokens(req)
        self._quota.add(self._batch, Chunk(req.prefix_len, req.extend_len), is_cut)
        return True


def _prompt_tokens(req: Any) -> int:
    return len(req.full_untruncated_fill_ids)


def after_adder_class(result: Any, scheduler: Any) -> Any:
    """AFTER ``Scheduler.get_prefill_adder_class``, which is asked at every pass."""
    engine = runtime_if_up()
    on = engine is not None and engine.prefill_timing.quota is not None
    return QuotaPrefillAdder if on else None
