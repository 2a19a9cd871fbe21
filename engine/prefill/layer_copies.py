"""One layer of some pages, copied between this engine's memory and a decode engine's."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence

from engine.kv_memory import page_runs
from engine.sglang.prefill.send_manager import SendManager
from transfer.mooncake import Addresses, Operation, batches, host_of, transfer_batch


class LayerCopies:
    """One-sided, by Mooncake. Thread-safe."""

    def __init__(self, manager: SendManager, num_layers: int, kv_layers: Sequence[int]) -> None:
        """``kv_layers``: of the model's layers those that have KV, in the order of the pool."""
        self.num_layers = num_layers
        self._kv_layers = kv_layers
        self._manager = manager
        self._lock = threading.Lock()
        self._moved_bytes: Counter[tuple[str, str]] = Counter()

    def copy(
        self, operation: Operation, session_id: str, here: Addresses, there: Addresses, layer: int
    ) -> None:
        """Write pages ``here`` to the decode engine's ``there``, or read them from there; both
        have shape (pages,). Index keys are written alone: a layer window, for which pages are
        read again, keeps those of every layer. A layer without KV has nothing to copy. Raises
        ``ConnectionError``."""
        if layer not in self._kv_layers:
            return
        if self._manager.is_refused(session_id):
            raise ConnectionError(f"session {session_id} failed before")
        buffers = self._manager.buffers(
            session_id, layer, self._kv_layers, with_index=operation == "write"
        )
        local, remote, lengths = page_runs(
            here, there, buffers.here, buffers.there, buffers.page_bytes
        )
        engine = self._manager.engine.engine
        for part in batches(lengths):
            code = transfer_batch(
                engine, operation, session_id, local[part], remote[part], lengths[part]
            )
            if code != 0:
                raise ConnectionError(f"transfer failed with code {code}")
        with self._lock:
            self._moved_bytes[operation, host_of(session_id)] += int(lengths.sum())

    def is_local(self, session_id: str) -> bool:
        """Whether that decode engine has this one's address."""
        return host_of(session_id) == str(self._manager.engine.hostname)

    def moved_bytes(self) -> dict[tuple[str, str], int]:
        """("write" or "read", the decode engines' address) -> bytes so far."""
        with self._lock:
            return dict(self._moved_bytes)
