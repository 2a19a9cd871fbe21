"""The nouns that every part shares: what a KV block is, and what names it.

A *block* is the KV of one page of tokens (64 by default) in all layers and for all
KV heads. An engine of several tensor-parallel ranks splits the heads: its blocks
consist of as many equal *shards*, one after the other, each the KV of one rank.
Inside a shard the bytes are layer-major: layer 0's components (K page, V page; a
single latent page for MLA, followed by a page of index keys for sparse attention), then
layer 1's, and so on, so that a *layer block*, the unit of delivery into a rank's device
memory, is one contiguous range.

What else of a model's state a hit needs is a *part*: the windows of sliding-window layers, the
states of recurrent ones. An object of a part is stored as a block is, under a key and with a
layout of its own (:func:`part_key`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from itertools import accumulate
from typing import NewType

import msgspec

BlockKey = NewType("BlockKey", bytes)
"""32 bytes: sha256 over the namespace digest and SGLang's page hash."""

KEY_BYTES = 32
NO_PARENT = BlockKey(bytes(KEY_BYTES))
"""Of the first block of a prefix, and where the parent is not known."""
MODEL_DIGEST_CHARS_MAX = 64
PART_NAME_CHARS_MAX = 16
WEIGHT_VERSION_BYTES_MAX = 128
TENANT_CHARS = 16


class BlockLayout(msgspec.Struct, frozen=True, omit_defaults=True):
    """Shape of a block's bytes.

    ``component_bytes`` are the sizes of one page in each buffer of a layer, with all KV
    heads: ``(K, V)`` for MHA/GQA, ``(latent,)`` for MLA, ``(latent, index keys)`` for
    DeepSeek's sparse attention.
    """

    page_tokens: int
    num_layers: int
    component_bytes: tuple[int, ...]
    shards: int = 1
    """Equal parts into which the KV heads are split; 1 where each rank holds all of them."""
    absent: tuple[tuple[int, ...], ...] = ()
    """For each component the layers that have none of it, ascending; empty where all layers are
    alike."""
    draft_layers: int = 0
    """How many layers, the last ones, are a draft's (EAGLE, MTP), which runs behind the model."""

    @property
    def model_layers(self) -> int:
        """Layers without the draft's."""
        return self.num_layers - self.draft_layers

    @property
    def bigrams(self) -> bool:
        """Whether keys are over pairs of tokens: what a draft keeps of a token is computed with
        the next one, so a block depends on one token more than it has."""
        return self.draft_layers > 0

    def sizes(self, layer: int) -> tuple[int, ...]:
        """Of a layer's components; 0 of those that it does not have."""
        if not self.absent:
            return self.component_bytes
        parts = zip(self.component_bytes, self.absent, strict=True)
        return tuple(0 if layer in without else size for size, without in parts)

    def layer_start(self, layer: int) -> int:
        """Where a layer begins in a block; of ``num_layers``: where the block ends."""
        if not self.absent:
            return layer * sum(self.component_bytes)
        return _layer_starts(self)[layer]

    @property
    def block_bytes(self) -> int:
        return self.layer_start(self.num_layers)

    @property
    def shard(self) -> BlockLayout:
        """Shape of one shard: what one rank's pages hold of a block."""
        sizes = tuple(size // self.shards for size in self.component_bytes)
        return msgspec.structs.replace(self, component_bytes=sizes, shards=1)

    def can_serve(self, shards: int) -> bool:
        """Whether an engine of so many shards can be given blocks of this layout: where the
        heads split evenly, they are cut or joined."""
        return self.shards % shards == 0 or shards % self.shards == 0


@lru_cache(256)
def _layer_starts(layout: BlockLayout) -> tuple[int, ...]:
    layers = (sum(layout.sizes(layer)) for layer in range(layout.num_layers))
    return tuple(accumulate(layers, initial=0))


class Part(msgspec.Struct, frozen=True):
    """State beside the blocks themselves, without which a hit of them is none.

    A hit that ends after block b (counted from 1) needs the part's objects of its last
    ``min(span_pages, b)`` blocks: the pages of a window, or 1 for a snapshot.
    """

    name: str
    """``window``, ``state``; of a state too large for a slot ``state0``, ``state1``, ..., each
    with some of the layers."""
    layout: BlockLayout
    """Of one object, in one shard, over all layers of the model: those that have nothing of the
    part are absent."""
    span_pages: int

    @property
    def kind(self) -> str:
        return part_kind(self.name)

    def needed(self, blocks: int) -> range:
        """The blocks whose objects a hit of so many blocks needs."""
        return range(max(0, blocks - self.span_pages), blocks)


def part_kind(name: str) -> str:
    """Of a part: its name without a number."""
    return name.rstrip("0123456789")


class Namespace(msgspec.Struct, frozen=True):
    """Everything that makes the KV of equal tokens different.

    Two engines may exchange blocks exactly when their namespaces are equal. The
    tenant's salt is not here: it seeds SGLang's page hashes themselves. Nor are the
    shards: a block has one key, whatever number of ranks computed it.
    """

    model_digest: str
    """Digest of the model's config and weights, never its name or path."""
    weight_version: str
    kv_dtype: str
    layout: BlockLayout
    """In one shard."""
    settings: str = ""
    """JSON of the flags of SGLang that change KV (:mod:`engine.sglang.kv_settings`)."""
    variant: int = 0
    """0, but where engines whose KV differs all the same had to be told apart
    (:mod:`engine.witness`)."""
    parts: tuple[Part, ...] = ()
    """Of the model's state, beside ``layout``; layers that have no KV are absent there."""

    def digest(self) -> bytes:
        """32 bytes, stable across processes and versions of msgspec."""
        fields = msgspec.to_builtins(self)
        if not self.parts:  # as before there were any
            del fields["parts"]
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).digest()


class BlockOwner(msgspec.Struct, frozen=True):
    """Whose a block is: what quotas count together and what is dropped together."""

    namespace_digest: bytes
    model_digest: str = ""
    weight_version: str = ""
    tenant: str = ""
    """:func:`tenant_digest` of the tenant's salt; empty where there is none."""
    part: str = ""
    """Kind of the part, of whose objects quotas may speak; empty of blocks, and in what is stored
    of an owner."""


class BlockLabel(msgspec.Struct, frozen=True):
    """What a stored block says of itself beside its key, for whoever finds it."""

    namespace_digest: bytes
    layout: BlockLayout
    model_digest: str = ""
    weight_version: str = ""
    tenant: str = ""
    parent: BlockKey = NO_PARENT
    """The block before it in its prefix, without which it is of no use; of an object of a part
    the block that it belongs to."""
    part: str = ""
    """Name of the part; empty of a block."""

    @property
    def part_owner(self) -> BlockOwner:
        """The owner as quotas know it."""
        return _of_part(self.owner, self.part) if self.part else self.owner

    @property
    def owner(self) -> BlockOwner:
        return BlockOwner(
            self.namespace_digest, self.model_digest, self.weight_version, self.tenant
        )


@lru_cache(256)
def _of_part(owner: BlockOwner, part: str) -> BlockOwner:
    return msgspec.structs.replace(owner, part=part_kind(part))


UNLABELLED = BlockLabel(bytes(32), BlockLayout(0, 0, ()))
"""Of blocks whose writer knows no namespace."""


def label_of(namespace: Namespace) -> BlockLabel:
    """The label of the blocks of a namespace; long names are cut to what a header holds."""
    version = namespace.weight_version.encode()[:WEIGHT_VERSION_BYTES_MAX]
    return BlockLabel(
        namespace.digest(),
        namespace.layout,
        namespace.model_digest[:MODEL_DIGEST_CHARS_MAX],
        version.decode(errors="ignore"),
    )


def tenant_digest(salt: str) -> str:
    """What is stored of a tenant: 16 hex digits, from which the salt cannot be told."""
    return hashlib.sha256(b"dualpath-tenant\0" + salt.encode()).hexdigest()[:TENANT_CHARS]


def block_keys(namespace_digest: bytes, page_hashes: Iterable[bytes]) -> list[BlockKey]:
    """Fold a namespace into SGLang's page hash chain (32-byte digests, in order)."""
    prefix = hashlib.sha256(b"dualpath-block-v1\0" + namespace_digest)
    keys = []
    for page_hash in page_hashes:
        digest = prefix.copy()
        digest.update(page_hash)
        keys.append(BlockKey(digest.digest()))
    return keys


def part_key(part: str, key: BlockKey) -> BlockKey:
    """Key of the object of a part that belongs to a block."""
    return BlockKey(hashlib.sha256(b"dualpath-part-v1\0" + part.encode() + b"\0" + key).digest())


class TierName(str, Enum):
    """Where a block can be held."""

    DRAM = "dram"
    SSD = "ssd"
    REMOTE = "remote"
