"""Packs and manifests say what they hold, or that they are damaged."""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from common.block import UNLABELLED, BlockLabel, BlockLayout
from storage.block_format import HEADER_BYTES, encode_header, verify
from storage.remote.packs.format import (
    TRAILER_BYTES,
    PackBuilder,
    PackDamaged,
    UnknownPackVersion,
    decode_footer,
    footer_bytes,
    is_pack_path,
    namespace_of,
    new_pack_path,
    order_of,
    scan,
    written_ms_of,
)
from storage.remote.packs.manifest import (
    ManifestUnusable,
    decode_manifest,
    encode_manifest,
    manifest_path,
    sequence_of,
)
from storage.remote.packs.pack import Pack
from tests.storage.conftest import key_of, payload_of

LABEL = BlockLabel(b"n" * 32, BlockLayout(64, 2, (128, 128)))
SIZES = [500, 4096, 1]


def make_pack(first: int = 0) -> bytes:
    builder, data = PackBuilder(), b""
    for number, nbytes in enumerate(SIZES, first):
        key = key_of(number)
        payload = payload_of(key, nbytes)
        label = LABEL if number % 2 else UNLABELLED
        data += encode_header(key, payload, label) + payload
        builder.add(key, nbytes, 1000 + number, label)
    return data + builder.footer()


def open_pack(path: str, data: bytes) -> Pack:
    length = footer_bytes(data[-TRAILER_BYTES:], len(data))
    return Pack(path, len(data), decode_footer(data[-length:], len(data)))


def check(pack: Pack, data: bytes, first: int = 0) -> None:
    assert pack.keys() == [key_of(first + i) for i in range(len(SIZES))]
    for row, nbytes in enumerate(SIZES):
        start, length = pack.span(row)
        stored = data[start : start + length]
        header = verify(stored[:HEADER_BYTES], stored[HEADER_BYTES:], key_of(first + row))
        assert header.payload_bytes == nbytes
        assert header.label == pack.label(row)


def test_a_footer_locates_every_block() -> None:
    data = make_pack()
    pack = open_pack("p", data)
    check(pack, data)
    assert pack.rows["written_ms"].tolist() == [1000, 1001, 1002]


def test_every_flip_and_cut_of_a_footer_is_found() -> None:
    data = make_pack()
    length = footer_bytes(data[-TRAILER_BYTES:], len(data))
    chance = random.Random(1)
    for position in range(len(data) - length, len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << chance.randrange(8)
        with pytest.raises((PackDamaged, UnknownPackVersion)):
            open_pack("p", bytes(damaged))
    for cut in range(1, length):
        with pytest.raises(PackDamaged):
            open_pack("p", data[:-cut])


def test_another_version_is_not_damage() -> None:
    data = bytearray(make_pack())
    struct.pack_into("<I", data, len(data) - TRAILER_BYTES + 8, 7)
    with pytest.raises(UnknownPackVersion, match="7"):
        open_pack("p", bytes(data))


def test_blocks_are_found_without_the_footer() -> None:
    data = make_pack()
    check(Pack("p", len(data), scan(data[:-20], 5)), data)


def test_a_damaged_header_costs_one_block() -> None:
    data = bytearray(make_pack())
    second = HEADER_BYTES + SIZES[0]
    data[second + 50] ^= 1
    found = Pack("p", len(data), scan(data, 5))
    assert found.keys() == [key_of(0), key_of(2)]
    start, length = found.span(1)
    stored = data[start : start + length]
    verify(stored[:HEADER_BYTES], stored[HEADER_BYTES:], key_of(2))


def test_a_manifest_holds_the_footers_of_many_packs() -> None:
    made = {new_pack_path(bytes(32), i): make_pack(10 * i) for i in range(4)}
    packs = [open_pack(path, data) for path, data in made.items()]
    data = encode_manifest(packs)
    path = manifest_path(3, data)
    assert sequence_of(path) == 3 and sequence_of("manifest/x") is None
    again = decode_manifest(path, data)
    assert [(p.path, p.nbytes) for p in again] == [(p.path, p.nbytes) for p in packs]
    for number, (pack, before) in enumerate(zip(again, packs, strict=True)):
        check(pack, made[pack.path], 10 * number)
        assert np.array_equal(pack.rows["written_ms"], before.rows["written_ms"])


def test_an_empty_manifest_reads_back() -> None:
    data = encode_manifest([])
    assert decode_manifest(manifest_path(0, data), data) == []


def test_every_damaged_manifest_is_refused() -> None:
    data = encode_manifest([open_pack(new_pack_path(bytes(32), 1), make_pack())])
    path = manifest_path(1, data)
    chance = random.Random(2)
    for _ in range(500):
        damaged = bytearray(data)
        damaged[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        if chance.random() < 0.2:
            del damaged[chance.randrange(len(data)) :]
        with pytest.raises(ManifestUnusable):
            decode_manifest(path, bytes(damaged))


def test_pack_names_tell_namespace_time_and_order() -> None:
    early, late = new_pack_path(b"a" * 32, 5), new_pack_path(b"b" * 32, 6)
    assert order_of(early) < order_of(late) and written_ms_of(late) == 6
    assert namespace_of(late) == b"b" * 32
    assert is_pack_path(early) and not is_pack_path(early + ".tmp")
