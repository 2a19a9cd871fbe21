"""Weights are written into an engine: its KV goes under another namespace from then on."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

from engine.model_digest import FolderReading
from engine.runtime import runtime
from engine.sglang.border import Use
from engine.weights import FolderDigested

log = logging.getLogger(__name__)

_SCHEDULER = "managers.scheduler.Scheduler."
_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_TREE = "mem_cache.unified_radix_cache.UnifiedRadixCache."
_IO = "managers.io_struct."
USES = (
    Use(_IO + "UpdateWeightsFromTensorReqOutput", "say why not", ("success", "message")),
    Use(_UPDATER + "tp_cpu_group", "the ranks, which meet at the end of an update"),
    Use(_IO + "UpdateWeightFromDiskReqInput.model_path", "the weights' folder"),
    Use(_IO + "UpdateWeightFromDiskReqOutput.success", "whether it was loaded"),
    Use(_IO + "UpdateWeightFromDiskReqOutput.message", "why not"),
    Use(_IO + "UpdateWeightVersionReqInput.new_version", "what the trainer calls its weights"),
    Use(_IO + "BeginWeightUpdateReqOutput.success", "whether a session is open"),
    Use(_IO + "EndWeightUpdateReqOutput.success", "whether it is over"),
    Use(_IO + "UpdateWeightsFromTensorReqInput.selector", "an update that needs a session"),
    Use(_IO + "UpdateWeightsFromDistributedReqInput.selector", "an update that needs a session"),
    Use(_UPDATER + "_session", "is one open?"),
    Use(_UPDATER + "scheduler", "of which requests and prefix tree are asked for"),
    Use(_SCHEDULER + "is_fully_idle", "is no request at work?", ("ignore_waiting",)),
    Use(_SCHEDULER + "_engine_paused", "waiting ones hold no KV then"),
    Use(_SCHEDULER + "tree_cache", "the prefix tree"),
    Use(_TREE + "evictable_size", "is it empty?"),
    Use(_TREE + "protected_size", "is it empty?"),
)
_NOT_BEGUN = "Failed to get weights iterator"
"""Begins what SGLang says of a folder that it could not open: the weights are what they were."""


def around_update_from_disk(original: Any, updater: Any, recv_req: Any) -> Any:
    """AROUND ``update_weights_from_disk``: the new weights are those of a folder."""
    engine = runtime()
    is_leader = engine.ranks.is_leader
    reading = FolderReading(Path(recv_req.model_path)) if is_leader else None
    before = engine.weights.state.changes
    result = original(updater, recv_req)
    change = engine.weights.state.changes
    if reading is not None and result.success:
        engine.weights.digesting()
        reading.loaded(lambda digest: engine.ranks.post(FolderDigested(change, digest)))
    elif reading is not None:
        reading.failed()
    if not result.success and change == before and not result.message.startswith(_NOT_BEGUN):
        engine.weights.failed(is_clean(updater.scheduler))
    return result


def around_other_update(original: Any, updater: Any, recv_req: Any) -> Any:
    """AROUND ``update_weights_from_distributed`` and ``_from_ipc``. SGLang refuses the first one,
    like tensors, outside a session."""
    weights = runtime().weights
    before = weights.state.changes
    is_refused = updater._session is None and hasattr(recv_req, "selector")
    result = original(updater, recv_req)
    if not result.success and weights.state.changes == before and not is_refused:
        weights.failed(is_clean(updater.scheduler))
    return result


def around_update_from_tensor(original: Any, updater: Any, recv_req: Any) -> Any:
    """The same for ``update_weights_from_tensor``, which may be none that can be opened."""
    try:
        return around_other_update(original, updater, recv_req)
    except Exception as error:  # noqa: BLE001 - of whatever a client has pickled
        log.exception("tensors could not be opened")
        runtime().weights.failed(is_clean(updater.scheduler))
        torch.distributed.barrier(group=updater.tp_cpu_group)  # the other ranks are there
        message = f"The tensors could not be opened: {error}"
        return UpdateWeightsFromTensorReqOutput(success=False, message=message)


def after_weight_version(result: Any, updater: Any, weight_version: str | None) -> None:
    """AFTER ``record_weight_version_after_update``: weights were written."""
    runtime().weights.changed(weight_version, is_clean(updater.scheduler))


def after_version_call(result: Any, scheduler: Any, recv_req: Any) -> None:
    """AFTER ``handle_update_weight_version``: of weights that may be written past SGLang."""
    runtime().weights.changed(recv_req.new_version, is_clean(scheduler))


def after_begin(result: Any, updater: Any, recv_req: Any) -> None:
    """AFTER ``begin_weight_update``."""
    if result.success:
        runtime().weights.session(True, is_clean(updater.scheduler))


def after_end(result: Any, updater: Any, recv_req: Any) -> None:
    """AFTER ``end_weight_update``."""
    if result.success:
        runtime().weights.session(False, is_clean(updater.scheduler))


def is_clean(scheduler: Any) -> bool:
    """Whether the engine holds no KV that a request may still use, or leave behind."""
    tree = scheduler.tree_cache
    is_idle: bool = scheduler.is_fully_idle(ignore_waiting=scheduler._engine_paused)
    return is_idle and tree.evictable_size() + tree.protected_size() == 0
