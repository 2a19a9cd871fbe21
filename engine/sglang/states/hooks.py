"""The functions of SGLang that call us for the states of recurrent layers."""

from __future__ import annotations

from engine.sglang.border import Hook

_SLOTS = "mem_cache.allocator.mamba.MambaSlotAllocator."
_OURS = "engine.sglang.states.slots:"
_TREE = "mem_cache.unified_radix_cache.UnifiedRadixCache."

EVERY_ENGINE = (
    Hook(
        "mem_cache.memory_pool.MambaPool.__init__",
        "around",
        _OURS + "around_pool",
        "some slots more than SGLang knows of: snapshots on their way out are copied there",
    ),
    Hook(
        _SLOTS + "free",
        "around",
        _OURS + "around_free",
        "a slot under a transfer is not given out again",
    ),
    Hook(
        _SLOTS + "available_size",
        "before",
        _OURS + "before_available_size",
        "return slots whose transfers have ended",
    ),
    Hook(
        _SLOTS + "clear",
        "after",
        _OURS + "after_clear",
        "a flush frees every slot: keep those under a transfer out",
    ),
    Hook(
        "managers.scheduler_components.pool_stats_observer.SchedulerPoolStatsObserver"
        ".session_held_mamba_slots",
        "after",
        _OURS + "after_session_held",
        "slots kept back stay accounted for in SGLang's leak check",
    ),
)

PREFILL = (
    Hook(
        _TREE + "checkpoint",
        "before",
        _OURS + "before_prompt_checkpoint",
        "offer the last snapshot of a prompt, and that where prompts part, to the agent",
    ),
)
