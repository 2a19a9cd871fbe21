"""The controls: objects of a remote store with one component of a part exchanged between layers,
and with checksums that are right. A hit of them has to give other tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from common.block import BlockLayout
from storage.block_format import HEADER_BYTES, decode_header, encode_header
from storage.remote.packs.format import scan

KV = ""
"""The part that blocks are."""


class Kind(NamedTuple):
    """What a control exchanges."""

    part: str
    """As :func:`group_of` says it."""
    component: int
    draft: bool = False
    """The draft's layers get what the model's have, which stay as they are."""

    @property
    def name(self) -> str:
        return f"{self.part or 'kv'}/{self.component}{' of the draft' if self.draft else ''}"


def layouts(store: Path) -> dict[str, BlockLayout]:
    """Of the objects of each part in a remote store; of blocks: :data:`KV`."""
    return {
        label.part: label.layout
        for path in _packs(store)
        for label in scan(path.read_bytes(), 0).labels
    }


def kinds_of(found: dict[str, BlockLayout]) -> list[Kind]:
    """Every component of every part. Where there is a draft, of its layers alone: the model's are
    those of the same model without one."""
    kinds = {
        Kind(group_of(part), component, layout.draft_layers > 0): None
        for part, layout in found.items()
        for component in range(len(layout.component_bytes))
        if moves(layout, Kind(part, component, layout.draft_layers > 0))
    }
    return list(kinds)


def group_of(part: str) -> str:
    """What a part belongs to: ``state`` of ``state0``, ``state1``..., each with some layers."""
    return part.rstrip("0123456789")


def moves(layout: BlockLayout, kind: Kind) -> list[tuple[slice, slice]]:
    """Where in an object, or a shard of it, bytes go, and where they come from: from another
    layer, or the other half where there is but one."""
    found = [_span(layout, layer, kind.component) for layer in range(layout.num_layers)]
    own = [span for span in found[: layout.model_layers] if span.stop > span.start]
    drafts = [span for span in found[layout.model_layers :] if span.stop > span.start]
    if kind.draft:
        return list(zip(drafts, own, strict=False))
    if len(own) == 1:
        start, half = own[0].start, (own[0].stop - own[0].start) // 2
        own = [slice(start, start + half), slice(start + half, start + 2 * half)]
    return list(zip(own, own[-1:] + own[:-1], strict=True))


def _span(layout: BlockLayout, layer: int, component: int) -> slice:
    sizes = layout.sizes(layer)
    start = layout.layer_start(layer) + sum(sizes[:component])
    return slice(start, start + sizes[component])


def exchange(store: Path, kind: Kind) -> int:
    """In place; returns how many objects have changed."""
    changed = 0
    for path in _packs(store):
        data = bytearray(path.read_bytes())
        for at in scan(data, 0).rows["offset"].tolist():
            changed += _exchange_at(data, at, kind)
        path.write_bytes(data)
    return changed


def _exchange_at(data: bytearray, at: int, kind: Kind) -> bool:
    header = decode_header(data[at : at + HEADER_BYTES])
    if group_of(header.label.part) != kind.part:
        return False
    begin, layout = at + HEADER_BYTES, header.label.layout
    payload = data[begin : begin + header.payload_bytes]
    for shard in range(0, layout.block_bytes, layout.shard.block_bytes):
        changes = [
            (shard + to.start, payload[shard + source.start : shard + source.stop])
            for to, source in moves(layout.shard, kind)
        ]
        for start, value in changes:
            payload[start : start + len(value)] = value
    data[begin : begin + header.payload_bytes] = payload
    data[at:begin] = encode_header(
        header.key, payload, header.label, header.sequence, header.written_ms
    )
    return True


def _packs(store: Path) -> Iterator[Path]:
    return (path for path in sorted(store.rglob("*.pack")) if path.is_file())
