"""The in-memory twin of the tiers: same contract, same bookkeeping, no threads."""

from __future__ import annotations

from collections.abc import Sequence

from common.block import BlockKey, TierName
from storage.block_format import encode_header, verify
from storage.index.owners import Quota
from storage.tiers.contract import BlockMissing, Wake
from storage.tiers.io_threads import CallerThread
from storage.tiers.operation import Operation
from storage.tiers.threaded_tier import ThreadedTier


class MemoryTier(ThreadedTier):
    """Keeps blocks in ``blocks``: each as (header, payload). For tests and dry runs.

    ``blocks`` may be shared by several tiers, as object stores are shared by agents;
    pass ``index_is_complete=False`` for such a tier to try keys that it did not write.
    """

    def __init__(
        self,
        name: TierName,
        on_wake: Wake,
        capacity_bytes: int = 0,
        blocks: dict[BlockKey, tuple[bytes, bytes]] | None = None,
        index_is_complete: bool = True,
        quotas: Sequence[Quota] = (),
    ) -> None:
        super().__init__(name, on_wake, capacity_bytes, quotas=quotas)
        self._caller = CallerThread()
        self.blocks = {} if blocks is None else blocks
        self.index_is_complete = index_is_complete

    def _executor(self, operation: Operation) -> CallerThread:
        return self._caller

    def close(self) -> None:
        """Nothing is open."""

    def _load(self, operation: Operation) -> None:
        if operation.key not in self.blocks:
            raise BlockMissing("not stored")
        header, payload = self.blocks[operation.key]
        operation.label = verify(header, payload, operation.key).label
        operation.deliver(payload)

    def _store(self, operation: Operation) -> None:
        payload = operation.private_payload()
        header = encode_header(operation.key, payload, operation.label)
        self.blocks[operation.key] = header, payload

    def _remove(self, operation: Operation) -> None:
        self.blocks.pop(operation.key, None)
