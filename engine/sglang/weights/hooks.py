"""The functions of SGLang that call us when its weights change."""

from __future__ import annotations

from engine.sglang.border import Hook

_SCHEDULER = "managers.scheduler.Scheduler."
_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
_UPDATES = "engine.sglang.weights.update_hooks:"
_SPANS = "engine.sglang.weights.span_hooks:"
_MEMORY = "engine.sglang.weights.memory_hooks:"

WEIGHTS = (
    Hook(
        _UPDATER + "update_weights_from_disk",
        "around",
        _UPDATES + "around_update_from_disk",
        "new weights make a new namespace; those of a folder are named by its digest",
    ),
    Hook(
        _UPDATER + "update_weights_from_tensor",
        "around",
        _UPDATES + "around_update_from_tensor",
        "tensors that cannot be opened end no engine",
    ),
    Hook(
        _UPDATER + "update_weights_from_distributed",
        "around",
        _UPDATES + "around_other_update",
        "an update that fails in its midst leaves weights that nobody knows",
    ),
    Hook(
        _UPDATER + "update_weights_from_ipc",
        "around",
        _UPDATES + "around_other_update",
        "an update that fails in its midst leaves weights that nobody knows",
    ),
    Hook(
        _UPDATER + "record_weight_version_after_update",
        "after",
        _UPDATES + "after_weight_version",
        "new weights make a new namespace: called by updates of every kind",
    ),
    Hook(
        _UPDATER + "begin_weight_update",
        "after",
        _UPDATES + "after_begin",
        "weights may be written, also without a call that says so",
    ),
    Hook(
        _UPDATER + "end_weight_update",
        "after",
        _UPDATES + "after_end",
        "they were",
    ),
    Hook(
        _SCHEDULER + "handle_update_weight_version",
        "after",
        _UPDATES + "after_version_call",
        "a trainer says how it calls weights that it has written",
    ),
    Hook(
        _SCHEDULER + "record_weight_version_change",
        "before",
        _SPANS + "before_version_change",
        "a retracted request's tokens keep the version that they were made with",
    ),
    Hook(
        _UPDATER + "release_memory_occupation",
        "around",
        _MEMORY + "around_release",
        "memory that is given back already is not given back again",
    ),
    Hook(
        _UPDATER + "resume_memory_occupation",
        "around",
        _MEMORY + "around_resume",
        "an engine that has given nothing back does not end when it is to take it again",
    ),
)
