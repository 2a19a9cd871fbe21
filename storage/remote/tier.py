"""Blocks in packs below any URL that fsspec knows; docs/storage.md."""

from __future__ import annotations

from collections.abc import Mapping

from common.block import TierName
from storage.index.held_blocks import HeldBlocks
from storage.remote.backend import RemoteBackend
from storage.remote.objects.object_store import RemoteUnusable
from storage.remote.objects.open_store import open_store
from storage.remote.packs.catalog import Drop
from storage.remote.packs.known import KnownPacks
from storage.remote.packs.pack import Pack
from storage.remote.settings import RemoteSettings
from storage.remote.witness_keeper import RemoteKeeper
from storage.tiers.block_tier import BlockTier
from storage.tiers.contract import Wake
from storage.tiers.operation_queue import OperationQueue
from storage.tiers.room import Room
from storage.witnesses import Keeper

__all__ = ["RemoteSettings", "RemoteTier", "RemoteUnusable"]


class RemoteTier(BlockTier):
    """Packs below ``url``, shared with other agents and clusters.

    The index has what this process wrote, and what its looks at the store have found. A read
    of a block that is not in it waits for a look that begins after the read was asked for. A block
    that has made no progress for ``timeout_s`` completes with TimeoutError, and what comes late
    is dropped. Blocks go by age and capacity, pack by pack, not because they are written
    (:mod:`storage.remote.packs.upkeep`). Raises :class:`RemoteUnusable`.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, object],
        on_wake: Wake,
        settings: RemoteSettings | None = None,
    ) -> None:
        settings = settings or RemoteSettings()
        store = open_store(url, options, settings.timeout_s)
        self._packs = KnownPacks(settings.capacity_bytes)
        queue = OperationQueue(on_wake)
        held = HeldBlocks(TierName.REMOTE, self._packs.bytes_at)
        room = Room(held, self._packs, queue.is_idle)
        backend = RemoteBackend(store, settings, queue, room, self._packs)
        self._indexer = backend.indexer
        self.keepers: list[Keeper] = [RemoteKeeper(backend.calls)]
        super().__init__(TierName.REMOTE, queue, room, backend, index_is_complete=False)

    @property
    def has_looked(self) -> bool:
        """What lay in the store at start is in the index."""
        return self._indexer.looks > 0

    @property
    def drops(self) -> Mapping[str, Drop]:
        """In force, by the paths of their objects."""
        return self._indexer.drops

    def known_packs(self) -> list[Pack]:
        """The oldest first."""
        return list(self._packs)
