"""The codec accepts exactly what it wrote."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from storage.block import BlockKey
from storage.block_format import (
    HEADER_BYTES,
    UnknownVersion,
    encode_header,
    key_of_name,
    object_name,
    verify,
)
from storage.tier import BlockCorrupt

KEY = BlockKey(bytes(range(32)))
PAYLOAD = b"kv" * 3000
FIELD_BYTES = 72


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=5000))
def test_round_trip(key: bytes, payload: bytes) -> None:
    header = encode_header(BlockKey(key), payload)
    assert len(header) == HEADER_BYTES
    verify(header, payload, BlockKey(key))


def test_the_documented_bytes() -> None:
    fields = struct.pack(
        "<8sIIQQ32s", b"DUALPATH", 1, 0, len(PAYLOAD), xxhash.xxh3_64_intdigest(PAYLOAD), KEY
    )
    checksum = struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))
    assert encode_header(KEY, PAYLOAD) == (fields + checksum).ljust(HEADER_BYTES, b"\0")
    assert object_name(KEY) == f"blocks/00/{KEY.hex()}"
    document = Path(__file__).parents[2] / "docs" / "block_format.md"
    assert "`DUALPATH`" in document.read_text()


@given(st.integers(0, FIELD_BYTES * 8 - 1))
def test_any_flipped_bit_of_the_header_is_found(bit: int) -> None:
    header = bytearray(encode_header(KEY, PAYLOAD))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises((BlockCorrupt, UnknownVersion)):
        verify(header, PAYLOAD, KEY)


@given(st.integers(0, len(PAYLOAD) * 8 - 1))
def test_any_flipped_bit_of_the_payload_is_found(bit: int) -> None:
    payload = bytearray(PAYLOAD)
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlockCorrupt, match="checksum"):
        verify(encode_header(KEY, PAYLOAD), payload, KEY)


@pytest.mark.parametrize("version", [0, 2, 77])
def test_another_version_is_missing_not_corrupt(version: int) -> None:
    header = bytearray(encode_header(KEY, PAYLOAD))
    struct.pack_into("<I", header, 8, version)
    with pytest.raises(UnknownVersion):
        verify(header, PAYLOAD, KEY)


def test_another_key_length_or_short_header_is_corrupt() -> None:
    header = encode_header(KEY, PAYLOAD)
    with pytest.raises(BlockCorrupt, match="holds block"):
        verify(header, PAYLOAD, BlockKey(bytes(32)))
    with pytest.raises(BlockCorrupt, match="payload of"):
        verify(header, PAYLOAD[:-1], KEY)
    with pytest.raises(BlockCorrupt, match="header"):
        verify(header[:100], PAYLOAD, KEY)


def test_names_of_blocks_only() -> None:
    assert key_of_name(KEY.hex()) == KEY
    for name in ("", "lock", KEY.hex()[:-2], KEY.hex().upper() + "AA", f"{KEY.hex()}.1.tmp"):
        assert key_of_name(name) is None
