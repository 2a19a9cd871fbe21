"""The SGLang process in which an engine's runtime is built."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.kv_memory import KvMemory
from engine.page_table import Window
from engine.report import EngineIdentity
from engine.sglang.states.pool import StateCopies
from engine.sglang.views import Allocator, Scheduler, TransferEngine
from engine.streams import Streams


class Host(msgspec.Struct, frozen=True):
    """What it has."""

    identity: EngineIdentity
    control: str
    """zmq endpoint to bind; empty: none."""
    scheduler: Scheduler
    transfer_engine: TransferEngine
    data_port: int
    """Where that takes TCP connections; 0: none."""
    memory: KvMemory
    allocators: Sequence[Allocator]
    """Of the blocks' pages, then of each part's places; parts may share one."""
    window: Window | None
    states: StateCopies | None
    """Of recurrent layers, where they are stored."""
    streams: Streams
    model_path: str
    weight_version: str
    settings: str
    """Of :func:`engine.sglang.kv_settings.kv_settings`."""
