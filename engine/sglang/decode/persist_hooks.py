"""Decode engine: the moments at which blocks become full (:mod:`engine.decode.persist`)."""

from __future__ import annotations

from engine.runtime import runtime
from engine.sglang.states.slots import offer_answer
from engine.sglang.views import Batch, Request


def after_batch_result(
    result: object, scheduler: object, batch: Batch, *_: object, **__: object
) -> None:
    """AFTER ``Scheduler.process_batch_result``: blocks that this step has filled."""
    persister = runtime().persister
    for req in batch.reqs:
        if not req.finished():
            persister.advance(req, _computed_tokens(req))


def before_checkpoint(tree: object, req: Request, *, up_to: int, **_: object) -> None:
    """BEFORE ``UnifiedRadixCache.checkpoint``: last chance while the request has its pages.

    ``up_to`` counts what SGLang has committed, also the token that the batch in flight (a
    batch ahead, with overlap) is about to compute.
    """
    persister, tokens = runtime().persister, min(up_to, _computed_tokens(req))
    persister.advance(req, tokens)
    if req.finished():
        offer_answer(req, tokens)
        persister.end(req)


def _computed_tokens(req: Request) -> int:
    """Tokens whose KV forwards that have ended computed: all but the newest output token."""
    return len(req.origin_input_ids) + max(0, len(req.output_ids) - 1)
