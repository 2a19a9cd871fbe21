"""What is in a store: ``stats``, ``ls``."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from common.block import NO_PARENT, BlockOwner
from common.json import JsonObject
from storage.index.owners import Selector
from storage.tools.view import StoredBlock, StoreSummary, StoreView

AGES_S = {"under an hour": 3600, "under a day": 86400, "under a week": 7 * 86400}
LONGER = "a week or more", "an unknown time"


class OwnerTotal(msgspec.Struct, frozen=True):
    """What a store holds of an owner."""

    namespace: str
    model: str
    version: str
    tenant_digest: str
    blocks: int
    payload_bytes: int


class PartTotal(msgspec.Struct):
    """What a store holds of a part of models' state."""

    objects: int = 0
    payload_bytes: int = 0

    def note(self, block: StoredBlock) -> None:
        """One more."""
        self.objects += 1
        self.payload_bytes += block.payload_bytes


class StoreContent(StoreSummary, kw_only=True):
    """Summary, owners, ages, and what the live tier has counted where it says so."""

    blocks: int
    payload_bytes: int
    parent_elsewhere_blocks: int
    parts: dict[str, PartTotal]
    """By name; of blocks themselves none."""
    owners: list[OwnerTotal]
    """Those with the most bytes first."""
    ages: dict[str, int]
    """Blocks by age."""
    counters: JsonObject | None


class BlockLine(msgspec.Struct, frozen=True):
    """A block, for a listing."""

    key: str
    part: str
    """Empty of a block itself."""
    payload_bytes: int
    written_ms: int
    where: str
    parent: str
    namespace: str
    model: str
    version: str
    tenant_digest: str


def stats(view: StoreView) -> StoreContent:
    """What is in the store; looks at every block."""
    totals: dict[BlockOwner, list[int]] = {}
    ages = dict.fromkeys([*AGES_S, *LONGER], 0)
    now_ms = time.time() * 1000
    blocks = nbytes = 0
    keys, parents = set(), []
    parts: dict[str, PartTotal] = {}
    for block in view.blocks():
        if block.label.part:
            parts.setdefault(block.label.part, PartTotal()).note(block)
        total = totals.setdefault(block.label.owner, [0, 0])
        total[0] += 1
        total[1] += block.payload_bytes
        blocks, nbytes = blocks + 1, nbytes + block.payload_bytes
        ages[_age(block, now_ms)] += 1
        keys.add(block.key)
        if block.label.parent != NO_PARENT:
            parents.append(block.label.parent)
    return StoreContent(
        **msgspec.structs.asdict(view.summary()),
        blocks=blocks,
        payload_bytes=nbytes,
        parent_elsewhere_blocks=sum(parent not in keys for parent in parents),
        parts=parts,
        owners=[
            OwnerTotal(**_names(owner), blocks=count, payload_bytes=size)
            for owner, (count, size) in sorted(totals.items(), key=lambda item: -item[1][1])
        ],
        ages=ages,
        counters=view.counters(),
    )


def _names(owner: BlockOwner) -> dict[str, str]:
    return {
        "namespace": owner.namespace_digest.hex(),
        "model": owner.model_digest,
        "version": owner.weight_version,
        "tenant_digest": owner.tenant,
    }


def _age(block: StoredBlock, now_ms: float) -> str:
    if not block.written_ms:
        return LONGER[1]
    age_s = (now_ms - block.written_ms) / 1000
    return next((name for name, limit_s in AGES_S.items() if age_s < limit_s), LONGER[0])


def chosen(view: StoreView, selector: Selector | None) -> Iterator[StoredBlock]:
    """The blocks of the owners selected."""
    for block in view.blocks():
        if selector is None or selector.value_of(block.label.owner) is not None:
            yield block


def ls(view: StoreView, selector: Selector | None, limit: int) -> Iterator[BlockLine]:
    """A line a block, at most ``limit`` of them; 0: all."""
    for number, block in enumerate(chosen(view, selector), 1):
        yield BlockLine(
            key=block.key.hex(),
            part=block.label.part,
            payload_bytes=block.payload_bytes,
            written_ms=block.written_ms,
            where=block.where,
            parent="" if block.label.parent == NO_PARENT else block.label.parent.hex(),
            **_names(block.label.owner),
        )
        if number == limit:
            return
