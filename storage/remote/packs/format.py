"""Codec of packs, the objects of the remote tier; docs/storage.md describes the bytes."""

from __future__ import annotations

import re
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from common.block import KEY_BYTES, NO_PARENT, BlockKey, BlockLabel
from storage.block_format import HEADER_BYTES, MAGIC, Buffer, decode_header
from storage.tiers.contract import BlockCorrupt, BlockMissing

VERSION = 1
ROW = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("offset", "<u8"),
        ("payload_bytes", "<u8"),
        ("written_ms", "<u8"),
        ("label", "<u4"),
        ("zero", "<u4"),
    ]
)
"""One block of a pack: where its header begins, and which of the footer's labels it has."""

_MAGIC = b"DUALPACK"
_TRAILER = struct.Struct("<8sIIQQQQ")
"""Magic, version, zero, start of the footer, bytes of the labels, rows, checksum."""
TRAILER_BYTES = _TRAILER.size
_LABELS = msgspec.json.Decoder(list[BlockLabel])
_NAME = re.compile(r"packs/([0-9a-f]{64})/([0-9a-f]{12})-[0-9a-f]{16}\.pack")

Rows = NDArray[np.void]
"""Of dtype :data:`ROW`."""


class PackDamaged(Exception):
    """The footer is not whole; the blocks may be."""


class UnknownPackVersion(Exception):
    """A pack of another format version: not readable here, not damaged."""


class PackContents(NamedTuple):
    """What a footer says: ``rows`` in the order of their offsets."""

    rows: Rows
    labels: list[BlockLabel]


class PackBuilder:
    """Footer of a pack whose blocks are added in their order."""

    def __init__(self) -> None:
        self._rows: list[tuple[bytes, int, int, int, int, int]] = []
        self._labels: dict[BlockLabel, int] = {}
        self._end = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, key: BlockKey, payload_bytes: int, written_ms: int, label: BlockLabel) -> None:
        """The block's header and payload lie at the end of what there is. Of its label, the
        parent is in its header alone."""
        shared = msgspec.structs.replace(label, parent=NO_PARENT)
        number = self._labels.setdefault(shared, len(self._labels))
        self._rows.append((key, self._end, payload_bytes, written_ms, number, 0))
        self._end += HEADER_BYTES + payload_bytes

    @property
    def contents(self) -> PackContents:
        return PackContents(np.array(self._rows, ROW), list(self._labels))

    def footer(self) -> bytes:
        """What follows the last block."""
        contents = self.contents
        labels = msgspec.json.encode(contents.labels)
        fields = (_MAGIC, VERSION, 0, self._end, len(labels), len(self._rows))
        body = labels + contents.rows.tobytes()
        return body + _TRAILER.pack(*fields, _checksum(body, fields))


def _checksum(body: Buffer, fields: tuple[bytes | int, ...]) -> int:
    digest = xxhash.xxh3_64(body)
    digest.update(_TRAILER.pack(*fields, 0))
    return digest.intdigest()


def footer_bytes(trailer: Buffer, pack_bytes: int) -> int:
    """Length of the footer whose last ``TRAILER_BYTES`` these are.

    Raises :class:`PackDamaged` or :class:`UnknownPackVersion`.
    """
    _, start, _, _, _ = _decode_trailer(trailer)
    if start > pack_bytes - TRAILER_BYTES:
        raise PackDamaged(f"a footer from byte {start} of {pack_bytes}")
    return pack_bytes - start


def decode_footer(footer: Buffer, pack_bytes: int) -> PackContents:
    """The whole footer, as long as :func:`footer_bytes` says.

    Raises :class:`PackDamaged` or :class:`UnknownPackVersion`.
    """
    view = memoryview(footer)
    fields, start, labels_bytes, count, checksum = _decode_trailer(view[-TRAILER_BYTES:])
    body = view[:-TRAILER_BYTES]
    if len(body) != labels_bytes + count * ROW.itemsize or start + len(view) != pack_bytes:
        raise PackDamaged("the footer has another length than it says")
    if checksum != _checksum(body, fields):
        raise PackDamaged("the footer's checksum does not match")
    rows = np.frombuffer(bytes(body[labels_bytes:]), ROW)
    return PackContents(rows, _LABELS.decode(body[:labels_bytes]))


def _decode_trailer(trailer: Buffer) -> tuple[tuple[bytes | int, ...], int, int, int, int]:
    if len(trailer) != TRAILER_BYTES:
        raise PackDamaged(f"{len(trailer)} bytes instead of a {TRAILER_BYTES}-byte trailer")
    magic, version, zero, start, labels_bytes, count, checksum = _TRAILER.unpack(trailer)
    if magic != _MAGIC:
        raise PackDamaged(f"magic is {magic!r}, not {_MAGIC!r}")
    if version != VERSION:
        raise UnknownPackVersion(f"pack version {version}, this program reads {VERSION}")
    fields = (magic, version, zero, start, labels_bytes, count)
    return fields, start, labels_bytes, count, checksum


def scan(pack: Buffer, written_ms: int) -> PackContents:
    """What the blocks of a pack say of themselves, where the footer is damaged.

    Payloads are not verified: readers do that.
    """
    builder = PackBuilder()
    view, rows = memoryview(pack), []
    for offset, key, payload_bytes, label in _headers(view):
        builder.add(key, payload_bytes, written_ms, label)
        rows.append(offset)
    contents = builder.contents
    contents.rows["offset"] = rows
    return contents


def _headers(view: memoryview) -> Iterator[tuple[int, BlockKey, int, BlockLabel]]:
    """Every whole block, also behind a damaged header."""
    data, at = bytes(view), 0
    while (at := data.find(MAGIC, at)) >= 0:
        try:
            header = decode_header(view[at : at + HEADER_BYTES])
        except (BlockCorrupt, BlockMissing):
            at += len(MAGIC)
            continue
        end = at + HEADER_BYTES + header.payload_bytes
        if end > len(data):
            at += len(MAGIC)
            continue
        yield at, header.key, header.payload_bytes, header.label
        at = end


AHEAD_MS_MAX = 3_600_000
"""A time so far ahead of this host's clock is taken for a wrong clock's."""


class PackClock:
    """Time in ms for packs, their blocks and drops: later than every one seen so far, so that
    a rewritten block counts more than its source, and a drop covers what its writer knew of,
    whatever other hosts' clocks say (a hybrid logical clock; Kulkarni et al., 2014)."""

    def __init__(self) -> None:
        self._last_ms = 0
        self._lock = threading.Lock()

    def see(self, ms: int) -> bool:
        """False for a time that is too far ahead to be followed."""
        if is_far_ahead(ms):
            return False
        with self._lock:
            self._last_ms = max(self._last_ms, ms)
        return True

    def see_rows(self, rows: Rows) -> None:
        """Those of a pack: some may have been written after it was named."""
        written_ms = rows["written_ms"].astype(np.int64)
        self.see(int(written_ms[written_ms <= now_ms() + AHEAD_MS_MAX].max(initial=0)))

    def next_ms(self) -> int:
        """Later than whatever was seen, or given out."""
        with self._lock:
            self._last_ms = max(self._last_ms + 1, now_ms())
            return self._last_ms


def now_ms() -> int:
    """Since the epoch."""
    return time.time_ns() // 1_000_000


def is_far_ahead(ms: int) -> bool:
    """No clock that is about right says this yet."""
    return ms > now_ms() + AHEAD_MS_MAX


# ---- names ------------------------------------------------------------------------------


def new_pack_path(namespace_digest: bytes, named_ms: int) -> str:
    """Below the remote URL; no two are alike, and later ones have greater names."""
    return f"packs/{namespace_digest.hex()}/{named_ms:012x}-{secrets.token_hex(8)}.pack"


def is_pack_path(path: str) -> bool:
    return _NAME.fullmatch(path) is not None


def order_of(path: str) -> str:
    """Of two packs with one block, the one with the greater order counts."""
    return path.rpartition("/")[2]


def written_ms_of(path: str) -> int:
    """When the pack was named, in ms since the epoch, by its writer's clock."""
    return int(order_of(path)[:12], 16)


def namespace_of(path: str) -> bytes:
    """Digest of the namespace of all blocks of the pack."""
    return bytes.fromhex(path.split("/")[1])
