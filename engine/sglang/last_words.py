"""What a scheduler that ends itself was at work on, for the gateway to know whom to blame.

SGLang's scheduler ends on any exception. Nothing is noted for this while it runs: the frames that
the exception has passed through still hold it.
"""

from __future__ import annotations

from traceback import walk_tb
from typing import Any

from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

from engine.runtime import runtime_if_up
from engine.sglang.border import Use

_SCHEDULER = "managers.scheduler.Scheduler."

USES = (
    Use("managers.io_struct.TokenizedGenerateReqInput.rid", "the request that was coming in"),
    Use(_SCHEDULER + "process_input_requests", "its `recv_req` is coming in"),
    Use(_SCHEDULER + "run_batch", "its `batch` is being computed"),
    Use(_SCHEDULER + "launch_batch_sample_if_needed", "its `cur_batch` gets its tokens"),
    Use(_SCHEDULER + "process_batch_result", "the results of its `batch` are being looked at"),
    Use("managers.schedule_batch.ScheduleBatch.prepare_for_extend", "a batch is formed: `self`"),
    Use("managers.schedule_batch.ScheduleBatch.prepare_for_decode", "a batch goes on: `self`"),
    Use(_SCHEDULER + "enable_overlap", "an error may come one batch late"),
    Use(_SCHEDULER + "last_batch", "the one before"),
    Use("managers.schedule_batch.ScheduleBatch.reqs", "its requests"),
)
LOCALS = {
    "process_input_requests": "recv_req",
    "run_batch": "batch",
    "launch_batch_sample_if_needed": "cur_batch",
    "process_batch_result": "batch",
    "prepare_for_extend": "self",
    "prepare_for_decode": "self",
}
"""Function -> the local name of what the scheduler is at work on there."""


def around_event_loop(original: Any, scheduler: Any) -> Any:
    """AROUND ``Scheduler.run_event_loop``, which returns at SGLang's own wish only."""
    try:
        return original(scheduler)
    except Exception as error:  # whatever it is, it ends the engine
        engine = runtime_if_up()
        if engine is not None:
            engine.say_last(at_work(scheduler, error), repr(error))
        raise


def at_work(scheduler: Any, error: BaseException) -> list[str]:
    """Ids of the requests that ``error`` may come of; empty if it tells nothing."""
    rids: list[str] = []
    for frame, _ in walk_tb(error.__traceback__):
        work: Any = frame.f_locals.get(LOCALS.get(frame.f_code.co_name, ""))
        if isinstance(work, TokenizedGenerateReqInput):
            rids = [str(work.rid)]
        elif hasattr(work, "reqs"):
            late = scheduler.last_batch if scheduler.enable_overlap else None
            requests = [*work.reqs, *(late.reqs if late is not None else ())]
            rids = list(dict.fromkeys(request.rid for request in requests))
    return rids
