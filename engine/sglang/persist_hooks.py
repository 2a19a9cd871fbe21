"""Decode engine: the moments at which blocks become full (:mod:`engine.decode.persist`)."""

from __future__ import annotations

from typing import Any

from engine.runtime import runtime


def after_batch_result(result: Any, scheduler: Any, batch: Any, *_: Any, **__: Any) -> None:
    """AFTER ``Scheduler.process_batch_result``: blocks that this step has filled.

    The newest token's KV is computed by the next step, so it is not complete yet.
    """
    persister = runtime().persister
    for req in batch.reqs:
        if not req.finished():
            persister.advance(req, len(req.origin_input_ids) + len(req.output_ids) - 1)


def before_checkpoint(tree: Any, req: Any, *, up_to: int, **_: Any) -> None:
    """BEFORE ``UnifiedRadixCache.checkpoint``: last chance while the request has its pages."""
    persister = runtime().persister
    persister.advance(req, up_to)
    if req.finished():
        persister.end(req)
