"""What an engine has registered of its memory: the KV pool, and one pool for each part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from common.block import (
    PART_NAME_CHARS_MAX,
    BlockKey,
    BlockLabel,
    BlockLayout,
    Namespace,
    label_of,
    part_key,
)
from common.board_word import FAILED
from common.messages.fields import INT64_MAX
from common.messages.from_engines import PartPlaces, RegisterEngine
from storage.block_format import fits_header
from transfer.credits import WORDS

LAYERS_MAX = FAILED - 1
"""That a completion word can count."""
PAGE_TOKENS_MAX = 1 << 16
PARTS_MAX = 128
"""Of a namespace: each recurrent layer's state may be one."""


class BadRegistration(Exception):
    """What an engine says of itself cannot be."""


class BadJob(Exception):
    """A job names what the engine has not registered, or not a place for each block."""


class Objects(NamedTuple):
    """What a job moves of one pool: one element for each object."""

    blocks: list[BlockKey]
    """That the objects belong to; blocks belong to themselves."""
    keys: list[BlockKey]
    places: np.ndarray
    """Shape (objects,), int64."""


class EnginePool(msgspec.Struct, frozen=True):
    """The KV pool of each rank, or the pool of one part."""

    part: str
    """Empty for the KV pool."""
    layout: BlockLayout
    """Of the objects that the ranks hold together."""
    places: int
    label: BlockLabel

    def objects(self, blocks: list[BlockKey], places: Sequence[int]) -> Objects:
        """A job's objects here. Raises :class:`BadJob`."""
        if len(places) != len(blocks) or not all(0 <= each < self.places for each in places):
            what = f"places of part {self.part}" if self.part else "pages"
            raise BadJob(
                f"{len(places)} {what} ({min(places, default=0)} to {max(places, default=0)}) for "
                f"{len(blocks)} blocks, of {self.places} {what}"
            )
        keys = [part_key(self.part, key) for key in blocks] if self.part else blocks
        return Objects(blocks, keys, np.array(places, np.int64))


def engine_pools(message: RegisterEngine) -> list[EnginePool]:
    """The KV pool, then those of the parts. Raises :class:`BadRegistration`."""
    namespace, whole = message.namespace, label_of(message.namespace)
    _check_parts(message)
    names = ["", *(part.name for part in namespace.parts)]
    layouts = [namespace.layout, *(part.layout for part in namespace.parts)]
    pools = []
    for name, layout, places in zip(
        names, layouts, [message.pages, *message.part_places], strict=True
    ):
        split = _split_layout(message, layout, name)
        label = msgspec.structs.replace(whole, layout=split, part=name)
        pools.append(EnginePool(name, split, places, label))
    return pools


def objects_of(
    pools: Sequence[EnginePool],
    keys: list[BlockKey],
    pages: Sequence[int],
    parts: Sequence[PartPlaces],
) -> list[Objects]:
    """What a job names in each pool; only of the KV pool where it names no parts. Raises
    :class:`BadJob`."""
    if parts and len(parts) != len(pools) - 1:
        raise BadJob(f"objects of {len(parts)} parts, of {len(pools) - 1}")
    named = [(keys, pages), *((part.keys, part.places) for part in parts)]
    return [pool.objects(*each) for pool, each in zip(pools, named, strict=False)]


def rank_addresses(message: RegisterEngine, index: int) -> list[np.ndarray]:
    """Of a rank's buffers, by pool; each of shape (layers, components), int64. Raises
    :class:`BadRegistration`."""
    memory, namespace = message.ranks[index], message.namespace
    if len(memory.part_addresses) != len(namespace.parts):
        raise BadRegistration(
            f"engine {message.engine}: addresses of {len(memory.part_addresses)} parts for "
            f"{len(namespace.parts)}"
        )
    layouts = [namespace.layout, *(part.layout for part in namespace.parts)]
    tables = [memory.kv_addresses, *memory.part_addresses]
    places = [message.pages, *message.part_places]
    return [
        _addresses(message, layout, table, count)
        for layout, table, count in zip(layouts, tables, places, strict=True)
    ]


def object_bytes_max(namespace: Namespace) -> int:
    """Size of the slots that its blocks and the objects of its parts need."""
    layouts = [namespace.layout, *(part.layout for part in namespace.parts)]
    return max(layout.block_bytes for layout in layouts)


# ---- checks -------------------------------------------------------------------------------


def _check_parts(message: RegisterEngine) -> None:
    parts, layout = message.namespace.parts, message.namespace.layout
    names = [part.name for part in parts]
    are_right = (
        len(parts) <= PARTS_MAX
        and len(set(names)) == len(names) == len(message.part_places)
        and all(0 < len(name) <= PART_NAME_CHARS_MAX and name.isascii() for name in names)
        and all(name.isprintable() for name in names)
        and all(part.span_pages > 0 for part in parts)
        and all(part.layout.num_layers == layout.num_layers for part in parts)
        and all(part.layout.page_tokens == layout.page_tokens for part in parts)
    )
    if not are_right:
        raise BadRegistration(
            f"engine {message.engine}: parts {parts} with {message.part_places} places"
        )


def _split_layout(message: RegisterEngine, layout: BlockLayout, part: str) -> BlockLayout:
    """In the engine's shards. Raises :class:`BadRegistration`."""
    shards, sizes = message.shards, layout.component_bytes
    if layout.shards != 1 or not 1 <= shards <= len(message.ranks) <= WORDS:
        raise BadRegistration(f"engine {message.engine}: {shards} shards of {layout}")
    if not 0 < layout.num_layers <= LAYERS_MAX or not 0 < layout.page_tokens <= PAGE_TOKENS_MAX:
        raise BadRegistration(f"engine {message.engine}: {layout}")
    # Heads are cut in each token; what one shard has all of, such as latents of groups of tokens or
    # a state, is not cut at all.
    unit = shards * layout.page_tokens if shards > 1 else 1
    if (
        not sizes
        or not fits_header(layout)
        or min(sizes) <= 0
        or any(size % unit for size in sizes)
    ):
        raise BadRegistration(f"engine {message.engine}: {sizes} bytes in {shards} shards")
    if not 0 <= layout.draft_layers < layout.num_layers:
        raise BadRegistration(f"engine {message.engine}: {layout.draft_layers} layers of a draft")
    if layout.absent and not _can_be_absent(layout, bool(message.namespace.parts)):
        raise BadRegistration(f"engine {message.engine}: absent {layout.absent}")
    return msgspec.structs.replace(layout, shards=shards)


def _can_be_absent(layout: BlockLayout, has_parts: bool) -> bool:
    """Whether each component is there in some layer, and each layer has one, unless it may have
    its state in a part."""
    layers = range(layout.num_layers)
    return (
        len(layout.absent) == len(layout.component_bytes)
        and any(layout.absent)
        and all(set(each) < set(layers) and sorted(set(each)) == [*each] for each in layout.absent)
        and (has_parts or all(any(layout.sizes(layer)) for layer in layers))
    )


def _addresses(
    message: RegisterEngine, layout: BlockLayout, table: list[list[int]], places: int
) -> np.ndarray:
    shape = (layout.num_layers, len(layout.component_bytes))
    try:
        addresses = np.array(table, np.int64)
    except ValueError as error:  # rows of unlike lengths
        raise BadRegistration(f"engine {message.engine}: {error}") from error
    if addresses.shape != shape or not addresses.size:
        raise BadRegistration(
            f"engine {message.engine}: addresses of shape {addresses.shape} for a layout of {shape}"
        )
    end = int(addresses.max()) + max(layout.component_bytes) // message.shards * places
    if end > INT64_MAX:
        raise BadRegistration(f"engine {message.engine}: no memory of a peer, up to {end:#x}")
    return addresses
