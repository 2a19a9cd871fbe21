"""How far the writers of a layer window may go: told to each agent, whenever it changes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from functools import partial

import numpy as np

from engine.prefill.layer_ring import LayerRing
from engine.ranks.group import CreditsAt
from engine.sglang.views import TransferEngine
from engine.transfers.session_workers import SessionWorkers
from transfer.credits import WORD_BYTES, credit_word
from transfer.mooncake import transfer_batch

log = logging.getLogger(__name__)

AGENTS_MAX = 1024
"""That are there at a time: what a process has sockets for."""


class CreditWriter:
    """Writes one rank's credits one-sidedly into agents' memory, the newest value only.

    ``at`` says where; what it lacks is not written.
    """

    def __init__(
        self,
        ring: LayerRing,
        rank: int,
        at: Mapping[str, CreditsAt],
        transfer_engine: TransferEngine,
        workers: SessionWorkers,
    ) -> None:
        self._ring = ring
        self._rank = rank
        self._at = at
        self._engine = transfer_engine
        self._workers = workers
        self._words = np.zeros(AGENTS_MAX, np.uint64)
        self._index: dict[str, int] = {}
        """Of each agent's word; that of one that has left goes to another."""
        self._lock = threading.Lock()
        self._queued: set[str] = set()
        transfer_engine.register(int(self._words.ctypes.data), self._words.nbytes)

    def push(self, agent: str) -> None:
        """From any thread; returns at once."""
        at = self._at.get(agent)
        if at is None:
            return
        with self._lock:
            if at.session_id in self._queued:  # of a restarted agent: not its predecessor's
                return
            self._queued.add(at.session_id)
        self._workers.submit(f"credits {at.session_id}", partial(self._write, at))

    def _write(self, at: CreditsAt) -> None:
        with self._lock:
            self._queued.discard(at.session_id)
            index = self._index_of(at.agent)
        self._words[index] = credit_word(at.tag, self._ring.free_until)
        source = int(self._words.ctypes.data) + index * WORD_BYTES
        target = at.address + self._rank * WORD_BYTES
        code = transfer_batch(
            self._engine.engine,
            "write",
            at.session_id,
            local=np.array([source]),
            remote=np.array([target]),
            lengths=np.array([WORD_BYTES]),
        )
        if code != 0:  # the agent is dead or hangs: its deliveries fail by themselves
            log.warning("credits not written agent=%s code=%d", at.agent, code)

    def _index_of(self, agent: str) -> int:
        index = self._index.get(agent)
        if index is None:
            left = next((name for name in self._index if name not in self._at), None)
            index = len(self._index) if left is None else self._index.pop(left)
            self._index[agent] = index
        return index
