"""Forwards are timed (:mod:`engine.prefill.forward_clock`)."""

from __future__ import annotations

from typing import Any

from engine.runtime import runtime_if_up
from engine.sglang.border import Use

USES = (Use("model_executor.model_runner.ModelRunner.is_draft_worker", "a draft's"),)


def around_forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kw: Any) -> Any:
    """AROUND ``ModelRunner.forward``; a draft's is no forward of its own."""
    engine = runtime_if_up()
    if engine is None or runner.is_draft_worker:
        return original(runner, forward_batch, *args, **kw)
    return engine.prefill_timing.clock.forward(
        lambda: original(runner, forward_batch, *args, **kw), forward_batch
    )
