"""The codec accepts exactly what it wrote."""

from __future__ import annotations

import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from common.block import BlockKey, BlockLabel, BlockLayout
from storage.block_format import (
    COMPONENTS_MAX,
    HEADER_BYTES,
    HEADER_FIELDS,
    UnknownVersion,
    encode_header,
    encode_owner,
    verify,
)
from storage.tiers.contract import BlockCorrupt

KEY = BlockKey(bytes(range(32)))
PAYLOAD = b"kv" * 3000
LABEL = BlockLabel(
    *(bytes(range(32, 64)), BlockLayout(64, 24, (2048, 1024)), "ab" * 32, "step-7", "c0" * 8),
    parent=BlockKey(bytes(range(64, 96))),
)
FIELD_BYTES = 512


@given(st.binary(min_size=32, max_size=32), st.binary(max_size=5000))
def test_round_trip(key: bytes, payload: bytes) -> None:
    header = encode_header(BlockKey(key), payload, LABEL, 7)
    assert len(header) == HEADER_BYTES
    decoded = verify(header, payload, BlockKey(key))
    assert (decoded.key, decoded.label, decoded.sequence) == (key, LABEL, 7)
    assert decoded.payload_bytes == len(payload)


def test_the_documented_bytes() -> None:
    checksum = xxhash.xxh3_64_intdigest(PAYLOAD)
    fields = struct.pack("<8sIIQQ", b"DUALPATH", 3, 2, len(PAYLOAD), checksum)
    fields += KEY + LABEL.parent + struct.pack("<QQ", 77, 99)
    fields += struct.pack(
        "<32s64s128s16s", LABEL.namespace_digest, b"ab" * 32, b"step-7", b"c0" * 8
    )
    fields += struct.pack("<II16Q", 64, 24, 2048, 1024, *[0] * 14)
    header = encode_header(KEY, PAYLOAD, LABEL, 77, 99)
    end = struct.pack("<Q", xxhash.xxh3_64_intdigest(fields))
    assert header == (fields + end).ljust(HEADER_BYTES, b"\0")
    raw = np.frombuffer(header, HEADER_FIELDS)[0]
    assert raw["magic"] == b"DUALPATH" and raw["version"] == 3 and raw["sequence"] == 77
    assert raw["written_ms"] == 99
    assert raw["payload_bytes"] == len(PAYLOAD) and raw["key"].tobytes() == KEY
    assert raw["parent"].tobytes() == LABEL.parent
    assert raw["owner"].tobytes() == encode_owner(LABEL.owner)
    document = Path(__file__).parents[2] / "docs" / "storage.md"
    assert "`DUALPATH`" in document.read_text()


def test_an_object_of_a_part_names_it() -> None:
    window = msgspec.structs.replace(LABEL, part="window")
    header = encode_header(KEY, PAYLOAD, window, 77, 99)
    assert verify(header, PAYLOAD, KEY).label == window
    block = encode_header(KEY, PAYLOAD, LABEL, 77, 99)
    assert (header[:488], header[512:]) == (block[:488], block[512:])
    assert np.frombuffer(header, HEADER_FIELDS)[0]["part"] == b"window"
    with pytest.raises(ValueError, match="too long"):
        encode_header(KEY, PAYLOAD, msgspec.structs.replace(LABEL, part="w" * 17))


@given(st.integers(0, FIELD_BYTES * 8 - 1), st.sampled_from(["", "window", "w" * 16]))
def test_any_flipped_bit_of_the_header_is_found(bit: int, part: str) -> None:
    label = msgspec.structs.replace(LABEL, part=part)
    header = bytearray(encode_header(KEY, PAYLOAD, label, 3))
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises((BlockCorrupt, UnknownVersion)):
        verify(header, PAYLOAD, KEY)


@given(st.integers(0, len(PAYLOAD) * 8 - 1))
def test_any_flipped_bit_of_the_payload_is_found(bit: int) -> None:
    payload = bytearray(PAYLOAD)
    payload[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BlockCorrupt, match="checksum"):
        verify(encode_header(KEY, PAYLOAD), payload, KEY)


@pytest.mark.parametrize("version", [0, 1, 2, 77])
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


def test_a_layout_that_does_not_fit_is_refused() -> None:
    layout = BlockLayout(64, 1, (1,) * (COMPONENTS_MAX + 1))
    with pytest.raises(ValueError, match="too many components"):
        encode_header(KEY, PAYLOAD, BlockLabel(bytes(32), layout))


def test_the_layers_of_a_draft_are_told() -> None:
    label = BlockLabel(bytes(32), BlockLayout(64, 62, (73728, 8448), draft_layers=1))
    assert verify(encode_header(KEY, PAYLOAD, label), PAYLOAD, KEY).label == label


def test_the_layers_that_lack_a_component_are_told() -> None:
    layout = BlockLayout(64, 256, (73728, 8448), absent=((), (1, 3, 63, 64, 255)))
    label = BlockLabel(bytes(32), layout)
    assert verify(encode_header(KEY, PAYLOAD, label), PAYLOAD, KEY).label == label
    assert layout.block_bytes == 256 * 73728 + 251 * 8448
    for layout in (
        BlockLayout(64, 257, (8, 8), absent=((), (1,))),
        BlockLayout(64, 4, (8,) * 4, absent=((), (1,), (), ())),
    ):
        with pytest.raises(ValueError, match="too many components or layers"):
            encode_header(KEY, PAYLOAD, BlockLabel(bytes(32), layout))
