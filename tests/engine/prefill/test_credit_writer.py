"""Each rank of an engine writes its own word into an agent's memory."""

import ctypes
import threading
import time
from typing import Any

import numpy as np

from engine.prefill.credit_writer import CreditWriter
from engine.prefill.layer_ring import LayerRing
from engine.ranks.group import CreditsAt
from engine.transfers.session_workers import SessionWorkers


class Memory:
    """What the writer uses of SGLang's transfer engine; a write is a memcpy."""

    def __init__(self) -> None:
        self.words = np.zeros(4, np.uint64)
        self.engine = self
        self.hangs = threading.Event()
        self.goes_on = threading.Event()

    def register(self, address: int, length: int) -> None:
        return

    def batch_transfer_sync_write(self, session, src, dst, lengths) -> int:
        if session == "hangs":
            self.hangs.set()
            self.goes_on.wait(20)
        for a, b, length in zip(src, dst, lengths, strict=True):
            ctypes.memmove(b, a, length)
        return 0

    def batch_transfer_async_write(self, *_) -> int:
        return 0  # not taken: then the synchronous call is made

    def holds(self, words: list[int]) -> bool:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and self.words.tolist() != words:
            time.sleep(0.001)
        return self.words.tolist() == words


def test_a_rank_writes_how_far_its_own_ring_is():
    at: dict[str, CreditsAt] = {}
    memory: Any = Memory()
    rings = [LayerRing(4, 2), LayerRing(4, 2)]
    writers = [
        CreditWriter(ring, rank, at, memory, SessionWorkers("test"))
        for rank, ring in enumerate(rings)
    ]
    for writer in writers:
        writer.push("a")  # nobody has said yet where to
    at["a"] = CreditsAt("a", "h:1", int(memory.words.ctypes.data) + 8)
    for writer in writers:
        writer.push("a")
    assert memory.holds([0, 2, 2, 0])
    rings[1].finish(0)
    writers[1].push("a")
    assert memory.holds([0, 2, 3, 0])
    # A restarted agent looks elsewhere.
    at["a"] = CreditsAt("a", "h:2", int(memory.words.ctypes.data))
    writers[1].push("a")
    assert memory.holds([0, 3, 3, 0])


def test_a_restarted_agent_is_told_though_a_write_to_its_predecessor_hangs():
    memory: Any = Memory()
    address = int(memory.words.ctypes.data)
    at = {"a": CreditsAt("a", "hangs", address)}
    writer = CreditWriter(LayerRing(4, 2), 0, at, memory, SessionWorkers("test"))
    writer.push("a")
    assert memory.hangs.wait(20)
    writer.push("a")  # waits behind it
    at["a"] = CreditsAt("a", "h:2", address + 8)
    writer.push("a")
    assert memory.holds([0, 2, 0, 0])
    memory.goes_on.set()
