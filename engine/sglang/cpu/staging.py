"""SGLang's staging of KV between unlike tensor-parallel sizes, on a CPU.

Where P and D split the KV heads otherwise, SGLang gathers the heads that a rank of D wants into
a staging buffer, sends it whole, and scatters it into D's pages
(sglang/srt/disaggregation/common/staging_buffer.py, staging_handler.py). That is written for
CUDA and XPU, with a variant in plain torch that also runs here once it is let. Without it P
writes one descriptor for each token, layer and head range: Mooncake's TCP transport refuses
that many at once, and the session counts as failed from then on.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from engine.sglang.border import Use

USES = (
    Use(
        "disaggregation.common.staging_buffer._STAGING_SUPPORTED_DEVICE_TYPES",
        'extended by "cpu"; without: StagingBuffer refuses the device, and wants streams that '
        "know theirs",
    ),
    Use(
        "disaggregation.common.staging_handler.DecodeStagingHandler.kv_buffer_info",
        "the buffers, put back after their device has been looked at",
    ),
)
_CPU = torch.device("cpu", 0)


class CpuStream(torch.cpu.Stream):
    """What SGLang asks of a stream: on a CPU everything is done when it is said."""

    def __init__(self, device: Any = _CPU, priority: int = -1) -> None:
        super().__init__(priority)
        self.device = device

    def synchronize(self) -> None:
        return


def let_a_cpu_stage() -> None:
    """Also on what the hooks do not reach."""
    from sglang.srt.disaggregation.common import staging_buffer

    staging_buffer._STAGING_SUPPORTED_DEVICE_TYPES += ("cpu",)
    torch.cpu.Stream = CpuStream


def any_device(*_: Any, **__: Any) -> None:
    """For ``_check_kv_on_staging_device``."""


def around_handler(
    original: Any, handler: Any, *args: Any, kv_buffer_info: dict[str, Any], **kwargs: Any
) -> None:
    """AROUND ``DecodeStagingHandler.__init__``."""
    numbered = {**kv_buffer_info, "k_buffers": [SimpleNamespace(device=_CPU)]}
    original(handler, *args, kv_buffer_info=numbered, **kwargs)
    handler.kv_buffer_info = kv_buffer_info
