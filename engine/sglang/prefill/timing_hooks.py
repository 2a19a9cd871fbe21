"""Forwards are timed, and the attention in them (:mod:`engine.prefill.forward_clock`)."""

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


def around_backend_attention(original: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ``AttentionBackend.forward``: one layer's, the writing of its KV included."""
    engine = runtime_if_up()
    if engine is None:
        return original(*args, **kwargs)
    return engine.prefill_timing.clock.attention(lambda: original(*args, **kwargs))
