"""A request arrives at a prefill engine, and leaves it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from common.ids import PLAN_OUTDATED
from engine.runtime import runtime_if_up
from engine.sglang.border import Use
from engine.sglang.prefill.forward_hooks import forwards

_REQUEST = "managers.schedule_batch.Req."
USES = (
    Use(_REQUEST + "skip_radix_cache_insert", "layer window: the radix tree stays empty"),
    Use(_REQUEST + "set_finish_with_abort", "refuse a request; the gateway plans it again"),
)


def before_add_request(queue: Any, req: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``PrefillBootstrapQueue.add``, which drops a request that is to be aborted."""
    _refuse_other_weights(req)
    followed = forwards()
    if followed is not None and followed.window is not None:
        req.skip_radix_cache_insert = True


def _refuse_other_weights(req: Any) -> None:
    """Abort a request whose plan was accepted before the last weight update: its decode engine
    would take this engine's KV for that of the older weights. The gateway plans it again. But one
    that its decode engine has retracted for the update is to be computed anew, all of it."""
    engine = runtime_if_up()
    if engine is None:
        return
    is_retracted = engine.plans.arrives(req.rid)
    if not engine.plans.is_outdated(req.rid):
        return
    if is_retracted:
        engine.plans.drop(req.rid)
    else:
        unavailable = HTTPStatus.SERVICE_UNAVAILABLE
        req.set_finish_with_abort(PLAN_OUTDATED, unavailable, "ServiceUnavailableError")


def around_inflight(original: Any, scheduler: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """AROUND ``process_disagg_prefill_inflight_queue``, the last thing before SGLang forms the
    next batch."""
    followed = forwards()
    if followed is None:
        return original(scheduler, *args, **kwargs)
    return followed.leaving.wait(lambda: original(scheduler, *args, **kwargs))
