"""An engine whose memory cannot be reached does not start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from common.block import BlockLayout
from engine.kv_memory import NOISE_ROWS, KvMemory, MemoryUnreachable, check_reachable, poison
from transfer.mooncake import TransferPeer

POOL = np.arange(4096, dtype=np.uint8)
MEMORY = KvMemory(BlockLayout(4, 2, (8, 8)), [[POOL.ctypes.data] * 2] * 2, "float32")


given_back: list[int] = []


def transfer_engine(engine: Any, session_id: str) -> Any:
    return SimpleNamespace(
        engine=engine,
        register=engine.register_memory,
        deregister=lambda address: given_back.append(engine.unregister_memory(address)),
        get_session_id=lambda: session_id,
    )


def test_memory_that_can_be_read_over_the_transport_is_enough():
    peer = TransferPeer("127.0.0.1", "tcp")
    peer.register(POOL.ctypes.data, POOL.nbytes)
    for _ in range(2):  # what it has registered is given back
        check_reachable(transfer_engine(peer._engine, peer.session_id), MEMORY)
    assert len(given_back) == 2


def test_memory_that_cannot_be_read_ends_the_engine_with_a_sentence():
    failing = SimpleNamespace(
        register_memory=lambda *_: 0,
        unregister_memory=lambda *_: 0,
        batch_transfer_async_read=lambda *_: 0,
        batch_transfer_sync_read=lambda *_: -1,
    )
    with pytest.raises(MemoryUnreachable, match="nvidia-peermem.*ulimit -l.*--transfer tcp"):
        check_reachable(transfer_engine(cast(Any, failing), "h:1"), MEMORY)


def test_a_registration_that_sglang_drops_ends_it_too():
    from engine.sglang.startup import after_batch_register

    after_batch_register(0, None, [], [])
    with pytest.raises(MemoryUnreachable, match="code -1"):
        after_batch_register(-1, None, [], [])


def test_poison_fills_all_but_the_pages_that_are_kept():
    page_tokens, pages, kept = 64, 2 * NOISE_ROWS // 64 + 1, [0, 3, 100]
    buffer, other = (torch.zeros(pages * page_tokens, 2, 4) for _ in range(2))
    poison([buffer, other, buffer], torch.float32, page_tokens, kept)
    for filled in (buffer, other):
        filled = filled.view(pages, -1)
        assert [page for page in range(pages) if not filled[page].any()] == kept
        assert (filled[1] != 0).all() and (filled[1] != filled[2]).any()
    assert (buffer != other).any()
