"""Memory that an engine gives back and takes again: each of it once."""

from __future__ import annotations

from typing import Any

from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import (
    ReleaseMemoryOccupationReqOutput,
    ResumeMemoryOccupationReqOutput,
)

from engine.sglang.border import Use

_IO = "managers.io_struct."
_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
USES = (
    Use("constants.GPU_MEMORY_ALL_TYPES", "what a call without tags is about"),
    Use(_IO + "ReleaseMemoryOccupationReqInput.tags", "which memory"),
    Use(_IO + "ResumeMemoryOccupationReqInput.tags", "which memory"),
    Use(_IO + "ReleaseMemoryOccupationReqOutput", "nothing is left to be done"),
    Use(_IO + "ResumeMemoryOccupationReqOutput", "nothing is left to be done"),
    Use(_UPDATER + "offload_tags", "what was given back"),
)


def around_release(original: Any, updater: Any, recv_req: Any) -> Any:
    """AROUND ``release_memory_occupation``: what is given back already is left alone."""
    asked = recv_req.tags or GPU_MEMORY_ALL_TYPES
    recv_req.tags = [tag for tag in asked if tag not in updater.offload_tags]
    return original(updater, recv_req) if recv_req.tags else ReleaseMemoryOccupationReqOutput()


def around_resume(original: Any, updater: Any, recv_req: Any) -> Any:
    """AROUND ``resume_memory_occupation``: SGLang's scheduler ends if it is to take what it has
    not given back, as one has that began anew since the others did."""
    asked = recv_req.tags or GPU_MEMORY_ALL_TYPES
    recv_req.tags = [tag for tag in asked if tag in updater.offload_tags]
    return original(updater, recv_req) if recv_req.tags else ResumeMemoryOccupationReqOutput()
