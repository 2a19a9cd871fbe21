"""SGLang's digests of what P sends (``--disaggregation-enable-kv-checksum``, docs/gpu.md)."""

from __future__ import annotations

from typing import Any

from engine.runtime import runtime
from engine.sglang.border import Use
from engine.sglang.views import Request

USES = (
    Use(
        "disaggregation.checksum.page_indices_for_request",
        "which pages are digested: P's begin behind the promised prefix",
    ),
    Use(
        "managers.schedule_batch.Req.expected_kv_checksum",
        "whether the digest has been looked at: 0 from then on, and where there is none",
    ),
    Use(
        "managers.schedule_batch.Req.skip_radix_cache_insert",
        "keep KV whose digest nobody has looked at out of the tree",
    ),
)


def around_page_indices(
    original: Any, scheduler: object, req: Any, end_idx: int, start_idx: int = 0
) -> Any:
    """AROUND ``page_indices_for_request``: SGLang takes the promised prefix for what
    ``cache_protected_len`` says, which is less since ``before_transfer_extend``."""
    promised = getattr(req, "dualpath_promised_tokens", 0)
    return original(scheduler, req, end_idx, max(start_idx, promised))


def before_mismatch(scheduler: object, req: Request, msg: str) -> None:
    """BEFORE ``_handle_kv_checksum_mismatch``, which aborts the request: nothing of it has been
    stored yet, and nothing will be. The gateway sends it once more."""
    engine = runtime()
    engine.restores.mismatches_total += 1
    engine.persister.end(req)


def before_release_aborted(scheduler: object, req: Any) -> None:
    """BEFORE ``Scheduler._release_aborted_request``: SGLang looks at a digest when the request
    joins a batch; of one that is aborted before, it would take the KV into its tree as it is."""
    if req.expected_kv_checksum:
        req.skip_radix_cache_insert = True
        runtime().persister.end(req)
