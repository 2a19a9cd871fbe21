"""Which of a request's tokens were made with which version of the weights.

SGLang notes it at each change of the version, for the requests in its batches and its queue. It
misses those that a pause has retracted: they wait at the decode engine to be prefilled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.srt.runtime_context import get_serving
from sglang.srt.utils.weight_versions import WeightVersionEvent

from engine.sglang.border import Use

_PREALLOC = "disaggregation.decode.DecodePreallocQueue."
_TRANSFER = "disaggregation.decode.DecodeTransferQueue."
_REQUEST = "managers.schedule_batch.Req."
USES = (
    Use("runtime_context.get_serving", "the version until now"),
    Use("utils.weight_versions.WeightVersionEvent", "where it ends in a request"),
    Use("managers.scheduler.Scheduler.disagg_decode_prealloc_queue", "who waits for pages"),
    Use("managers.scheduler.Scheduler.disagg_decode_transfer_queue", "who waits for KV"),
    Use(_PREALLOC + "held_rebootstrap_reqs", "retracted by a pause"),
    Use(_PREALLOC + "retracted_queue", "retracted for want of memory"),
    Use(_PREALLOC + "queue", "waiting for pages"),
    Use(_TRANSFER + "queue", "waiting for KV"),
    Use("disaggregation.decode.DecodeRequest.req", "the request there"),
    Use(_REQUEST + "pd_rebootstrap_forced_output_id", "its last token, taken off meanwhile"),
    Use(_REQUEST + "weight_version_events", "what SGLang makes spans of"),
)


def before_version_change(scheduler: Any, new_version: str | None) -> None:
    """BEFORE ``record_weight_version_change``."""
    old = get_serving().weight_version
    if new_version is None or new_version == old:
        return
    for req in _waiting(scheduler):
        forced = req.pd_rebootstrap_forced_output_id is not None
        tokens = len(req.output_ids) + forced
        if tokens:
            req.weight_version_events.append(WeightVersionEvent(old, tokens))


def _waiting(scheduler: Any) -> Iterator[Any]:
    """At a decode engine."""
    queue = getattr(scheduler, "disagg_decode_prealloc_queue", None)
    if queue is None:
        return
    yield from queue.held_rebootstrap_reqs
    yield from queue.retracted_queue
    for waiting in (*queue.queue, *scheduler.disagg_decode_transfer_queue.queue):
        yield waiting.req
