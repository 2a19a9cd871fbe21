"""The engine runtime starts within SGLang's scheduler process."""

from __future__ import annotations

import logging
from typing import Any

from sglang.srt.mem_cache.utils import get_hash_str

from engine.config import EngineConfig
from engine.runtime import start_runtime
from engine.sglang.border import Use
from engine.sglang.pool_hooks import poison_pool

log = logging.getLogger(__name__)

USES = (
    Use(
        "mem_cache.utils.get_hash_str",
        "compiled at first use: 5 s that some request would wait for",
    ),
)


def after_init_disaggregation(result: Any, scheduler: Any) -> None:
    """AFTER ``Scheduler.init_disaggregation``: SGLang's P/D side exists."""
    engine = start_runtime(EngineConfig.from_env(), scheduler)
    if engine.config.role == "prefill":
        get_hash_str([0])
    engine.config.experiment.announce(log)
    if engine.config.experiment.poison_kv:
        poison_pool(engine)
