"""The requests that an engine has, wherever SGLang keeps them."""

from __future__ import annotations

from typing import Any

from engine.sglang.border import Use
from engine.sglang.views import Request

_SCHEDULER = "managers.scheduler.Scheduler."

USES = (
    Use(_SCHEDULER + "running_batch", "what decodes"),
    Use("managers.schedule_batch.ScheduleBatch.reqs", "its requests"),
    Use(_SCHEDULER + "waiting_queue", "what waits for a batch"),
    Use(_SCHEDULER + "disagg_prefill_bootstrap_queue", "what waits for its decode engine"),
    Use("disaggregation.prefill.PrefillBootstrapQueue.queue", "its requests"),
    Use(_SCHEDULER + "disagg_decode_prealloc_queue", "what waits for memory"),
    Use("disaggregation.decode.DecodePreallocQueue.queue", "its requests"),
    Use(_SCHEDULER + "disagg_decode_transfer_queue", "what waits for its KV"),
    Use("disaggregation.decode.DecodeTransferQueue.queue", "its requests"),
    Use("disaggregation.decode.DecodeRequest.req", "a queue of requests, or of these"),
    Use(_SCHEDULER + "chunked_req", "what the last prefill batch has cut"),
    Use(_SCHEDULER + "tree_cache", "the engine's own prefix cache"),
    Use(
        "mem_cache.unified_radix_cache.UnifiedRadixCache.evictable_size",
        "memory that a new request may take",
    ),
)


class EngineRequests:
    """Read from any thread, without locks."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def running(self) -> list[Request]:
        """In the batch that decodes."""
        return list(self._scheduler.running_batch.reqs)

    def waiting(self) -> list[Request]:
        """For a batch, memory, the other engine, or KV."""
        scheduler = self._scheduler
        found = list(scheduler.waiting_queue)
        for queue in (
            scheduler.disagg_prefill_bootstrap_queue,
            scheduler.disagg_decode_prealloc_queue,
            scheduler.disagg_decode_transfer_queue,
        ):
            found += [getattr(entry, "req", entry) for entry in queue.queue] if queue else []
        return found

    def cut(self) -> list[Request]:
        """Of which the last prefill batch took a part."""
        request = self._scheduler.chunked_req
        return [request] if request is not None else []

    def evictable_tokens(self) -> int:
        """In the engine's own prefix cache, and of use to nobody at present."""
        return int(self._scheduler.tree_cache.evictable_size())
