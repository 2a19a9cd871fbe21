"""Codec of a block on disk and in objects; docs/block_format.md describes the bytes."""

from __future__ import annotations

import struct

import xxhash

from storage.block import KEY_BYTES, BlockKey
from storage.tier import BlockCorrupt, BlockMissing

HEADER_BYTES = 4096
MAGIC = b"DUALPATH"
VERSION = 1

_FIELDS = struct.Struct("<8sIIQQ32s")
_CHECKSUM = struct.Struct("<Q")
_PAD = bytes(HEADER_BYTES - _FIELDS.size - _CHECKSUM.size)

Buffer = bytes | bytearray | memoryview


class UnknownVersion(BlockMissing):
    """The bytes are a block of another format version: not readable here, not corrupt."""


def encode_header(key: BlockKey, payload: Buffer) -> bytes:
    """The ``HEADER_BYTES`` that precede ``payload``."""
    checksum = xxhash.xxh3_64_intdigest(payload)
    fields = _FIELDS.pack(MAGIC, VERSION, 0, len(payload), checksum, key)
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)) + _PAD


def verify(header: Buffer, payload: Buffer, key: BlockKey) -> None:
    """Return only if ``payload`` is block ``key``, whole and unchanged.

    Raises :class:`UnknownVersion` (a BlockMissing) or :class:`BlockCorrupt`.
    """
    if len(header) != HEADER_BYTES:
        raise BlockCorrupt(f"{len(header)} bytes instead of a {HEADER_BYTES}-byte header")
    magic, version, _, length, checksum, stored_key = _FIELDS.unpack_from(header)
    if magic != MAGIC:
        raise BlockCorrupt(f"magic is {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise UnknownVersion(f"format version {version}, this program reads {VERSION}")
    (header_checksum,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    if header_checksum != xxhash.xxh3_64_intdigest(memoryview(header)[: _FIELDS.size]):
        raise BlockCorrupt("header checksum does not match")
    if stored_key != key:
        raise BlockCorrupt(f"holds block {stored_key.hex()}, not {key.hex()}")
    if length != len(payload):
        raise BlockCorrupt(f"payload of {length} bytes, expected {len(payload)}")
    if checksum != xxhash.xxh3_64_intdigest(payload):
        raise BlockCorrupt("payload checksum does not match")


def object_name(key: BlockKey) -> str:
    """Where a block lies below a tier's root; 256 folders keep each of them small."""
    name = key.hex()
    return f"blocks/{name[:2]}/{name}"


def key_of_name(name: str) -> BlockKey | None:
    """The key of a file's base name; None if the name is not that of a block."""
    try:
        key = bytes.fromhex(name)
    except ValueError:
        return None
    return BlockKey(key) if len(key) == KEY_BYTES and key.hex() == name else None
