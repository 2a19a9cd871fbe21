"""The footers of many packs in one Parquet file; docs/storage.md.

Any Parquet reader can look into it: columns ``pack``, ``pack_bytes``, ``key``, ``offset``,
``payload_bytes``, ``written_ms``, ``label`` (JSON).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from common.block import KEY_BYTES, BlockLabel
from storage.block_format import Buffer
from storage.remote.packs.format import ROW, PackContents
from storage.remote.packs.pack import Pack

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = b"1"
_NAME = re.compile(r"manifest/([0-9a-f]{12})-([0-9a-f]{16})\.parquet")
_LABEL = msgspec.json.Decoder(BlockLabel)


class ManifestUnusable(Exception):
    """Damaged, or of another format version."""


def manifest_path(sequence: int, data: Buffer) -> str:
    """Below the remote URL. ``sequence``: when the latest of its packs was named. The checksum
    covers every byte, so that a damaged file is refused before anything parses it."""
    return f"manifest/{sequence:012x}-{xxhash.xxh3_64_hexdigest(data)}.parquet"


def sequence_of(path: str) -> int | None:
    """When the latest of its packs was named, in ms; None if the path is not that of a
    manifest."""
    match = _NAME.fullmatch(path)
    return int(match[1], 16) if match else None


def encode_manifest(packs: Iterable[Pack]) -> bytes:
    """Rows of all the packs, dead ones too: what the packs' own footers say."""
    import pyarrow as pa  # 0.3 s, and only a remote tier needs it
    import pyarrow.parquet as pq

    packs = [pack for pack in packs if len(pack.rows)]
    rows = np.concatenate([pack.rows for pack in packs]) if packs else np.empty(0, ROW)
    labels: dict[bytes, int] = {}
    label_of = []
    for pack in packs:
        texts = [msgspec.json.encode(label) for label in pack.labels]
        own = np.array([labels.setdefault(text, len(labels)) for text in texts], np.int32)
        label_of.append(own[pack.rows["label"]])
    counts = [len(pack.rows) for pack in packs]
    number = np.repeat(np.arange(len(packs), dtype=np.int32), counts)
    table = pa.table(
        {
            "pack": _dictionary(number, [pack.path for pack in packs]),
            "pack_bytes": np.repeat(np.array([p.nbytes for p in packs], np.uint64), counts),
            "key": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(KEY_BYTES), len(rows), [None, pa.py_buffer(rows["key"].tobytes())]
            ),
            **{name: rows[name] for name in ("offset", "payload_bytes", "written_ms")},
            "label": _dictionary(
                np.concatenate(label_of) if label_of else np.empty(0, np.int32),
                [text.decode() for text in labels],
            ),
        }
    ).replace_schema_metadata({"dualpath.manifest": VERSION})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=["pack", "label"])
    return bytes(sink.getvalue())


def _dictionary(indices: NDArray[np.int32], values: list[str]) -> pa.DictionaryArray:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(values, pa.string()))


def decode_manifest(path: str, data: Buffer) -> list[Pack]:
    """The packs, each with all of its rows. Raises :class:`ManifestUnusable`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    match = _NAME.fullmatch(path)
    if match is None or match[2] != xxhash.xxh3_64_hexdigest(data):
        raise ManifestUnusable(f"{path}: the checksum does not match")
    table = pq.read_table(pa.BufferReader(data), use_threads=False).unify_dictionaries()
    if (table.schema.metadata or {}).get(b"dualpath.manifest") != VERSION:
        raise ManifestUnusable(f"{path}: another format version")
    table = table.combine_chunks()
    if not table.num_rows:
        return []
    rows = np.zeros(table.num_rows, ROW)
    keys = table["key"].combine_chunks()
    first = keys.offset * KEY_BYTES
    raw = keys.buffers()[1][first : first + table.num_rows * KEY_BYTES]
    rows["key"] = np.frombuffer(raw, f"V{KEY_BYTES}")
    for name in ("offset", "payload_bytes", "written_ms"):
        rows[name] = table[name].to_numpy()
    return list(_packs_of(table, rows))


def _packs_of(table: pa.Table, rows: NDArray[np.void]) -> Iterable[Pack]:
    """Cut the table's rows where another pack begins."""
    packs, labels = (table[name].combine_chunks() for name in ("pack", "label"))
    names = packs.dictionary.to_pylist()
    texts = [_LABEL.decode(text) for text in labels.dictionary.to_pylist()]
    number, label = packs.indices.to_numpy(), labels.indices.to_numpy()
    sizes = table["pack_bytes"].to_numpy()
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        used, own = np.unique(label[start:end], return_inverse=True)
        part = rows[start:end]
        part["label"] = own
        contents = PackContents(part, [texts[i] for i in used])
        yield Pack(names[number[start]], int(sizes[start]), contents)
