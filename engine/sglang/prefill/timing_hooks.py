"""Forwards are timed (:mod:`engine.prefill.forward_clock`)."""

from __future__ import annotations

from typing import Any

from engine.runtime import runtime_if_up


def around_forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kw: Any) -> Any:
    """AROUND ``ModelRunner.forward``."""
    engine = runtime_if_up()
    if engine is None:
        return original(runner, forward_batch, *args, **kw)
    return engine.prefill_timing.clock.forward(
        lambda: original(runner, forward_batch, *args, **kw), forward_batch
    )
