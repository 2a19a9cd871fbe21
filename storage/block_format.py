"""Codec of a block on disk and in objects; docs/storage.md describes the bytes."""

from __future__ import annotations

import struct
from functools import lru_cache

import msgspec
import numpy as np
import xxhash

from storage.block import KEY_BYTES, UNLABELLED, BlockKey, BlockLabel, BlockLayout
from storage.tier import BlockCorrupt, BlockMissing

HEADER_BYTES = 4096
MAGIC = b"DUALPATH"
VERSION = 2
COMPONENTS_MAX = 16

_START = struct.Struct("<8sII")  # magic, version, number of components
_BODY = struct.Struct("<QQ32s")  # payload length, its checksum, block key
_LABEL = struct.Struct(f"<32sII{COMPONENTS_MAX}Q")
_SEQUENCE = struct.Struct("<Q")
_CHECKSUM = struct.Struct("<Q")
_BODY_AT = _START.size
_LABEL_AT = _BODY_AT + _BODY.size
_SEQUENCE_AT = _LABEL_AT + _LABEL.size
_CHECKSUM_AT = _SEQUENCE_AT + _SEQUENCE.size
_PAD = bytes(HEADER_BYTES - _CHECKSUM_AT - _CHECKSUM.size)

HEADER_FIELDS = np.dtype(
    {
        "names": ["magic", "version", "payload_bytes", "key", "sequence"],
        "formats": ["S8", "<u4", "<u8", f"V{KEY_BYTES}", "<u8"],
        "offsets": [0, 8, _BODY_AT, _BODY_AT + 16, _SEQUENCE_AT],
        "itemsize": HEADER_BYTES,
    }
)
"""Some fields of many headers at once; their checksums are then still to be checked."""

Buffer = bytes | bytearray | memoryview


class UnknownVersion(BlockMissing):
    """The bytes are a block of another format version: not readable here, not corrupt."""


class BlockHeader(msgspec.Struct, frozen=True):
    """What a block says of itself."""

    key: BlockKey
    label: BlockLabel
    sequence: int
    payload_bytes: int
    payload_checksum: int


def encode_header(
    key: BlockKey, payload: Buffer, label: BlockLabel = UNLABELLED, sequence: int = 0
) -> bytes:
    """The ``HEADER_BYTES`` that precede ``payload``.

    ``sequence`` orders the writes of one SSD tier; objects have 0. Raises ValueError if
    the layout has more than ``COMPONENTS_MAX`` components.
    """
    checksum = xxhash.xxh3_64_intdigest(payload)
    fields = b"".join(
        (
            _START.pack(MAGIC, VERSION, len(label.layout.component_bytes)),
            _BODY.pack(len(payload), checksum, key),
            _encode_label(label),
            _SEQUENCE.pack(sequence),
        )
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)) + _PAD


def decode_header(header: Buffer) -> BlockHeader:
    """Raises :class:`UnknownVersion` (a BlockMissing) or :class:`BlockCorrupt`."""
    if len(header) != HEADER_BYTES:
        raise BlockCorrupt(f"{len(header)} bytes instead of a {HEADER_BYTES}-byte header")
    magic, version, components = _START.unpack_from(header)
    if magic != MAGIC:
        raise BlockCorrupt(f"magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise UnknownVersion(f"format version {version}, this program reads {VERSION}")
    view = memoryview(header)
    (checksum,) = _CHECKSUM.unpack_from(header, _CHECKSUM_AT)
    if checksum != xxhash.xxh3_64_intdigest(view[:_CHECKSUM_AT]):
        raise BlockCorrupt("header checksum does not match")
    payload_bytes, payload_checksum, key = _BODY.unpack_from(header, _BODY_AT)
    label = _decode_label(bytes(view[_LABEL_AT:_SEQUENCE_AT]), components)
    (sequence,) = _SEQUENCE.unpack_from(header, _SEQUENCE_AT)
    return BlockHeader(key, label, sequence, payload_bytes, payload_checksum)


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


# An agent sees few labels, and each of them with every block.
@lru_cache(256)
def _encode_label(label: BlockLabel) -> bytes:
    layout = label.layout
    count = len(layout.component_bytes)
    if count > COMPONENTS_MAX:
        raise ValueError(f"layout of {count} components a layer, at most {COMPONENTS_MAX}")
    sizes = layout.component_bytes + (0,) * (COMPONENTS_MAX - count)
    return _LABEL.pack(label.namespace_digest, layout.page_tokens, layout.num_layers, *sizes)


@lru_cache(256)
def _decode_label(raw: bytes, components: int) -> BlockLabel:
    digest, page_tokens, num_layers, *sizes = _LABEL.unpack(raw)
    return BlockLabel(digest, BlockLayout(page_tokens, num_layers, tuple(sizes[:components])))


def object_name(key: BlockKey) -> str:
    """Where a block lies below a remote URL; 256 folders keep each of them small."""
    name = key.hex()
    return f"blocks/{name[:2]}/{name}"


def key_of_name(name: str) -> BlockKey | None:
    """The key of a file's base name; None if the name is not that of a block."""
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return BlockKey(key) if len(key) == KEY_BYTES and key.hex() == name else None
