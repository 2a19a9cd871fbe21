"""Decode engine: the moments at which blocks become full (:mod:`engine.decode.persist`)."""

from __future__ import annotations

from engine.runtime import runtime
from engine.sglang.views import Batch, Request


def after_batch_result(
    result: object, scheduler: object, batch: Batch, *_: object, **__: object
) -> None:
    """AFTER ``Scheduler.process_batch_result``: blocks that this step has filled.

    The newest token's KV is computed by the next step, so it is not complete yet.
    """
    persister = runtime().persister
    for req in batch.reqs:
        if not req.finished():
            persister.advance(req, len(req.origin_input_ids) + len(req.output_ids) - 1)


def before_checkpoint(tree: object, req: Request, *, up_to: int, **_: object) -> None:
    """BEFORE ``UnifiedRadixCache.checkpoint``: last chance while the request has its pages."""
    persister = runtime().persister
    persister.advance(req, up_to)
    if req.finished():
        persister.end(req)
