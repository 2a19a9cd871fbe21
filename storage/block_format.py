"""Codec of a block on disk and in objects; docs/storage.md describes the bytes."""

from __future__ import annotations

import struct
from functools import lru_cache

import msgspec
import numpy as np
import xxhash

from common.block import (
    KEY_BYTES,
    MODEL_DIGEST_CHARS_MAX,
    PART_NAME_CHARS_MAX,
    TENANT_CHARS,
    UNLABELLED,
    WEIGHT_VERSION_BYTES_MAX,
    BlockKey,
    BlockLabel,
    BlockLayout,
    BlockOwner,
)
from storage.tiers.contract import BlockCorrupt, BlockMissing

HEADER_BYTES = 4096
MAGIC = b"DUALPATH"
VERSION = 3
COMPONENTS_MAX = 16
ABSENT_LAYERS_MAX = 256
"""Of a layout in which some layers lack a component."""
OWNER_BYTES = KEY_BYTES + MODEL_DIGEST_CHARS_MAX + WEIGHT_VERSION_BYTES_MAX + TENANT_CHARS

_START = struct.Struct("<8sIHH")  # magic, version, number of components, shards beyond the first
_BODY = struct.Struct("<QQ32s32sQQ")
"""Payload length, its checksum, key, parent, sequence, time of writing."""
_OWNER = struct.Struct(
    f"<{KEY_BYTES}s{MODEL_DIGEST_CHARS_MAX}s{WEIGHT_VERSION_BYTES_MAX}s{TENANT_CHARS}s"
)
_LAYOUT = struct.Struct(f"<IHH{COMPONENTS_MAX}Q")
"""Tokens of a page, layers, those of a draft, sizes."""
_WORDS = ABSENT_LAYERS_MAX // 64
_WORD_MAX = (1 << 64) - 1
_CHECKSUM = struct.Struct("<Q")
_BODY_AT = _START.size
_OWNER_AT = _BODY_AT + _BODY.size
_LAYOUT_AT = _OWNER_AT + _OWNER.size
_CHECKSUM_AT = _LAYOUT_AT + _LAYOUT.size
_PART_AT = _CHECKSUM_AT + _CHECKSUM.size
_PART_END = _PART_AT + PART_NAME_CHARS_MAX
_NO_PART = bytes(PART_NAME_CHARS_MAX)
_PAD = bytes(HEADER_BYTES - _PART_END)
_PLAIN_PAD = _NO_PART + _PAD

_FIELDS = (
    ("magic", "S8", 0),
    ("version", "<u4", 8),
    ("payload_bytes", "<u8", _BODY_AT),
    ("key", f"V{KEY_BYTES}", _BODY_AT + 16),
    ("parent", f"V{KEY_BYTES}", _BODY_AT + 48),
    ("sequence", "<u8", _BODY_AT + 80),
    ("written_ms", "<u8", _BODY_AT + 88),
    ("owner", f"V{OWNER_BYTES}", _OWNER_AT),
    ("part", f"S{PART_NAME_CHARS_MAX}", _PART_AT),
)
HEADER_FIELDS = np.dtype(
    {
        "names": [name for name, _, _ in _FIELDS],
        "formats": [kind for _, kind, _ in _FIELDS],
        "offsets": [offset for _, _, offset in _FIELDS],
        "itemsize": HEADER_BYTES,
    }
)
"""Some fields of many headers at once; :func:`has_right_checksum` tells which to believe."""

Buffer = bytes | bytearray | memoryview


class UnknownVersion(BlockMissing):
    """The bytes are a block of another format version: not readable here, not corrupt."""


class BlockHeader(msgspec.Struct, frozen=True):
    """What a block says of itself."""

    key: BlockKey
    label: BlockLabel
    sequence: int
    written_ms: int
    payload_bytes: int
    payload_checksum: int


def encode_header(
    key: BlockKey,
    payload: Buffer,
    label: BlockLabel = UNLABELLED,
    sequence: int = 0,
    written_ms: int = 0,
) -> bytes:
    """The ``HEADER_BYTES`` that precede ``payload``.

    ``sequence`` orders the writes of one SSD tier; objects have 0. ``written_ms`` counts from
    1970; 0 where another place tells it. Raises ValueError if the layout does not fit
    (:func:`fits_header`), or a name of the owner, or of the part, is too long.
    """
    part = label.part.encode()
    if len(part) > PART_NAME_CHARS_MAX:
        raise ValueError(f"{label.part!r} is too long for the name of a part")
    checksum, layout = xxhash.xxh3_64_intdigest(payload), label.layout
    fields = b"".join(
        (
            _START.pack(MAGIC, VERSION, len(layout.component_bytes), layout.shards - 1),
            _BODY.pack(len(payload), checksum, key, label.parent, sequence, written_ms),
            encode_owner(label.owner),
            _encode_layout(layout),
        )
    )
    # A block has no name of a part, so its header is what it was before there were parts.
    digest = xxhash.xxh3_64_intdigest(fields + part if part else fields)
    pad = part.ljust(PART_NAME_CHARS_MAX, b"\0") + _PAD if part else _PLAIN_PAD
    return fields + _CHECKSUM.pack(digest) + pad


def decode_header(header: Buffer) -> BlockHeader:
    """Raises :class:`UnknownVersion` (a BlockMissing) or :class:`BlockCorrupt`."""
    if len(header) != HEADER_BYTES:
        raise BlockCorrupt(f"{len(header)} bytes instead of a {HEADER_BYTES}-byte header")
    magic, version, components, more_shards = _START.unpack_from(header)
    if magic != MAGIC:
        raise BlockCorrupt(f"magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise UnknownVersion(f"format version {version}, this program reads {VERSION}")
    view = memoryview(header)
    if not has_right_checksum(view):
        raise BlockCorrupt("header checksum does not match")
    body = _BODY.unpack_from(header, _BODY_AT)
    payload_bytes, payload_checksum, key, parent, sequence, written_ms = body
    owner = decode_owner(bytes(view[_OWNER_AT:_LAYOUT_AT]))
    layout = _decode_layout(bytes(view[_LAYOUT_AT:_CHECKSUM_AT]), components, more_shards + 1)
    label = BlockLabel(
        namespace_digest=owner.namespace_digest,
        layout=layout,
        model_digest=owner.model_digest,
        weight_version=owner.weight_version,
        tenant=owner.tenant,
        parent=parent,
        part=_decode_part(bytes(view[_PART_AT:_PART_END])),
    )
    return BlockHeader(key, label, sequence, written_ms, payload_bytes, payload_checksum)


def has_right_checksum(header: memoryview) -> bool:
    """Is the header, of this version, as it was written?"""
    (checksum,) = _CHECKSUM.unpack_from(header, _CHECKSUM_AT)
    fields, part = header[:_CHECKSUM_AT], header[_PART_AT:_PART_END]
    if part != _NO_PART:
        fields = memoryview(bytes(fields) + bytes(part).rstrip(b"\0"))
    return bool(checksum == xxhash.xxh3_64_intdigest(fields))


def verify(header: Buffer, payload: Buffer, key: BlockKey) -> BlockHeader:
    """Return only if ``payload`` is block ``key``, whole and unchanged.

    Raises :class:`UnknownVersion` (a BlockMissing) or :class:`BlockCorrupt`.
    """
    decoded = decode_header(header)
    if decoded.key != key:
        raise BlockCorrupt(f"holds block {decoded.key.hex()}, not {key.hex()}")
    if decoded.payload_bytes != len(payload):
        raise BlockCorrupt(
            f"payload of {decoded.payload_bytes} bytes, expected {len(payload)} bytes"
        )
    if decoded.payload_checksum != xxhash.xxh3_64_intdigest(payload):
        raise BlockCorrupt("payload checksum does not match")
    return decoded


def fits_header(layout: BlockLayout) -> bool:
    """Whether a header can tell the layout of its block."""
    count = len(layout.component_bytes)
    if not layout.absent:
        return count <= COMPONENTS_MAX
    return count * (1 + _WORDS) <= COMPONENTS_MAX and layout.num_layers <= ABSENT_LAYERS_MAX


# An agent sees few owners and layouts, and each of them with every block.
@lru_cache(1024)
def encode_owner(owner: BlockOwner) -> bytes:
    """The header's ``OWNER_BYTES``; raises ValueError if a name is longer than its field."""
    texts = [t.encode() for t in (owner.model_digest, owner.weight_version, owner.tenant)]
    sizes = (MODEL_DIGEST_CHARS_MAX, WEIGHT_VERSION_BYTES_MAX, TENANT_CHARS)
    for text, size in zip(texts, sizes, strict=True):
        if len(text) > size:
            raise ValueError(f"{text!r} has {len(text)} bytes, at most {size} fit a block's header")
    return _OWNER.pack(owner.namespace_digest, *texts)


@lru_cache(1024)
def decode_owner(raw: bytes) -> BlockOwner:
    """What :func:`encode_owner` made."""
    digest, *texts = _OWNER.unpack(raw)
    return BlockOwner(digest, *(text.rstrip(b"\0").decode(errors="replace") for text in texts))


@lru_cache(256)
def _decode_part(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")


@lru_cache(256)
def _encode_layout(layout: BlockLayout) -> bytes:
    if not fits_header(layout):
        raise ValueError(f"too many components or layers for a block's header: {layout}")
    # Which layers lack a component is a bitmap of each, in the fields that no size needs.
    bitmaps = (sum(1 << layer for layer in layers) for layers in layout.absent)
    words = [bitmap >> 64 * i & _WORD_MAX for bitmap in bitmaps for i in range(_WORDS)]
    fields = [*layout.component_bytes, *words]
    fields += [0] * (COMPONENTS_MAX - len(fields))
    return _LAYOUT.pack(layout.page_tokens, layout.num_layers, layout.draft_layers, *fields)


@lru_cache(256)
def _decode_layout(raw: bytes, components: int, shards: int) -> BlockLayout:
    page_tokens, num_layers, draft_layers, *fields = _LAYOUT.unpack(raw)
    sizes, words = tuple(fields[:components]), fields[components:]
    absent: tuple[tuple[int, ...], ...] = ()
    if any(words):
        absent = tuple(_layers_of(words[c * _WORDS : (c + 1) * _WORDS]) for c in range(components))
    return BlockLayout(page_tokens, num_layers, sizes, shards, absent, draft_layers)


def _layers_of(words: list[int]) -> tuple[int, ...]:
    return tuple(i for i in range(len(words) * 64) if words[i // 64] >> i % 64 & 1)
