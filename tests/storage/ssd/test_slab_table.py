"""The table of a slab: believed where it is right, doubted where it is not, never in the way."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.block import KEY_BYTES
from storage.ssd.direct_io import PAGE_BYTES
from storage.ssd.slab import Slab, slot_bytes_for
from storage.ssd.slab_table import (
    ENTRIES_PER_PAGE,
    ENTRY_BYTES,
    RECORD,
    decode_table,
    encode_table,
    table_bytes_for,
)
from storage.ssd.tier import SsdTier
from tests.storage.conftest import key_of, no_wake, payload_of, read, write
from tests.storage.ssd.slab_files import flip, overwrite, table_bytes_of

SLOT_BYTES = slot_bytes_for(len(payload_of(key_of(0))))
BLOCKS = 3 * ENTRIES_PER_PAGE
KEYS = [key_of(i) for i in range(BLOCKS)]

_numbers = st.integers(0, 2**64 - 1)
_record = st.tuples(
    *(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES), st.binary(max_size=KEY_BYTES)),
    *(_numbers, _numbers, _numbers, _numbers),
    st.sampled_from([b"", b"window", b"0123456789abcdef"]),
)
_tables = st.lists(_record, min_size=1, max_size=8).map(lambda rows: np.array(rows, RECORD))


@given(_tables)
def test_a_table_says_what_was_written(records: np.ndarray) -> None:
    records[records["sequence"] == 0] = np.zeros((), RECORD)
    found, is_wrong = decode_table(encode_table(records))
    assert not is_wrong.any() and (found == records).all()


@given(_tables, st.data())
def test_a_changed_entry_is_not_believed(records: np.ndarray, data: st.DataObject) -> None:
    records["sequence"] |= 1
    raw, slot = bytearray(encode_table(records)), data.draw(st.integers(0, len(records) - 1))
    at = slot * ENTRY_BYTES + data.draw(st.integers(0, RECORD.itemsize - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    found, is_wrong = decode_table(bytes(raw))
    assert np.flatnonzero(is_wrong).tolist() == [slot]
    assert found["sequence"][slot] == 0, "as if it were free"


@given(_tables.filter(lambda records: len(records) > 1))
def test_an_entry_is_right_in_its_own_slot_only(records: np.ndarray) -> None:
    records["sequence"] |= 1
    raw = encode_table(records)
    moved = raw[ENTRY_BYTES:] + raw[:ENTRY_BYTES]
    assert decode_table(moved)[1].all()


@pytest.fixture
def slab(tmp_path: Path) -> Path:
    """The first slab of a folder with ``KEYS`` in it."""
    tier = SsdTier(tmp_path, 16 * BLOCKS * SLOT_BYTES, no_wake, threads=2)
    assert all(completion.error is None for completion in write(tier, *KEYS).values())
    tier.close()
    (slab,) = tmp_path.glob("*.slab")
    assert table_bytes_of(slab) == 3 * PAGE_BYTES
    return slab


def _look(slab: Path) -> None:
    """A start finds every block, and reads what it says."""
    tier = SsdTier(slab.parent, 16 * BLOCKS * SLOT_BYTES, no_wake, threads=2)
    assert sorted(tier.keys()) == sorted(KEYS)
    assert all(read(tier, key)[1] == payload_of(key) for key in KEYS[::20])
    tier.close()


def _headers_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every group of headers that is asked for."""
    seen: list[int] = []
    real = Slab._headers

    def noted(slab: Slab, first: int) -> np.ndarray:
        seen.append(first)
        return real(slab, first)

    monkeypatch.setattr(Slab, "_headers", noted)
    return seen


def _flip(slab: Path) -> None:
    flip(slab, 5 * ENTRY_BYTES + 40)


def _spoil_a_page(slab: Path) -> None:
    overwrite(slab, PAGE_BYTES, os.urandom(PAGE_BYTES))


def _lose_owners(slab: Path) -> None:
    (slab.parent / "owners").unlink()


@pytest.mark.parametrize("damage", [_flip, _spoil_a_page, _lose_owners])
def test_what_the_table_does_not_tell_the_headers_do(
    slab: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    seen = _headers_read(monkeypatch)
    _look(slab)
    assert not seen, "a right table suffices"
    damage(slab)
    _look(slab)
    assert seen
    seen.clear()
    _look(slab)
    assert not seen, "the table is right again"


def test_a_page_of_the_table_that_cannot_be_read_costs_no_block(
    slab: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The headers tell, and the page is written anew, which mends most bad sectors."""
    real = os.preadv

    def bad_page(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset <= PAGE_BYTES < offset + sum(buffer.nbytes for buffer in buffers):
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, buffers, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", bad_page)
        _look(slab)
    _look(slab)


def test_a_disk_that_takes_whole_pages_only_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused, table_bytes = os.pwritev, [], table_bytes_for(BLOCKS)

    def pages_only(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset % PAGE_BYTES or sum(memoryview(each).nbytes for each in buffers) % PAGE_BYTES:
            refused.append(offset < table_bytes)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pages_only)
    tier = SsdTier(tmp_path, 16 * BLOCKS * SLOT_BYTES, no_wake, threads=2)
    assert all(completion.error is None for completion in write(tier, *KEYS).values())
    tier.close()
    assert refused and all(refused), "entries alone are tried in less than a page"
    (slab,) = tmp_path.glob("*.slab")
    _look(slab)
