"""The job's rows, by number, on disk: any order of millions of them in little memory.

Built once from the input (two passes over it: types, then rows) as one Arrow IPC file of
equal batches, which is mapped, not read. A job that goes on uses this file and never looks
at changed input unawares. Columns that the job does not know stay as they are, with the
prefix ``carried:``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common.json import JsonObject
from launch.rollout.input.files import BadInput, CarriedTypes, Chunk, carried_columns, chunks
from launch.rollout.input.rows import BadRow, Row, parse_row

BATCH_ROWS = 64
_CARRIED = "carried:"
_FIELDS = pa.schema(
    [
        pa.field("row", pa.binary()),  # a Row as MessagePack; null where it is bad
        pa.field("reason", pa.string()),  # why it is bad
        pa.field("length", pa.int32()),
    ]
)


class PromptTable:
    """Read access to a built table."""

    def __init__(self, path: Path) -> None:
        """Raises :class:`BadInput` if the file is not one of :func:`build_table`."""
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"{path}: {error}; begin anew with --overwrite.") from error
        metadata = self._file.schema.metadata
        self.rows = int(metadata[b"rows"])
        self.digest = metadata[b"digest"].decode()
        carried = [f for f in self._file.schema if f.name.startswith(_CARRIED)]
        self.carried_schema = pa.schema(
            [f.with_name(f.name.removeprefix(_CARRIED)) for f in carried]
        )
        self._decoder = msgspec.msgpack.Decoder(Row)

    def row(self, number: int) -> Row:
        """Raises :class:`BadRow`."""
        batch, place = self._locate(number)
        data = batch.column("row")[place].as_py()
        if data is None:
            raise BadRow(batch.column("reason")[place].as_py())
        return self._decoder.decode(data)

    def fields(self, number: int, row: Row) -> JsonObject:
        """The row as the input had it, for an environment."""
        batch, place = self._locate(number)
        known = {k: v for k, v in msgspec.to_builtins(row).items() if v is not None}
        names = self.carried_schema.names
        return known | {n: batch.column(_CARRIED + n)[place].as_py() for n in names}

    def carried(self, numbers: Sequence[int]) -> list[pa.Array]:
        """The carried columns of these rows (ascending, repeats allowed)."""
        names = self.carried_schema.names
        parts: list[list[pa.Array]] = [[] for _ in names]
        for index, group in groupby(numbers, lambda number: number // BATCH_ROWS):
            batch = self._file.get_batch(index)
            places = pa.array([number % BATCH_ROWS for number in group], pa.int32())
            for part, name in zip(parts, names, strict=True):
                part.append(batch.column(_CARRIED + name).take(places))
        return [pa.concat_arrays(part) for part in parts]

    def lengths(self) -> NDArray[np.int32]:
        """Of each row, about, in tokens; 0 where it is bad."""
        batches = (self._file.get_batch(i) for i in range(self._file.num_record_batches))
        parts = [batch.column("length").to_numpy() for batch in batches]
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def prompts(self) -> Iterator[bytes | None]:
        """What identifies each row's prompt, in order."""
        for index in range(self._file.num_record_batches):
            yield from self._file.get_batch(index).column("row").to_pylist()

    def _locate(self, number: int) -> tuple[pa.RecordBatch, int]:
        return self._file.get_batch(number // BATCH_ROWS), number % BATCH_ROWS


def build_table(files: list[Path], input_digest: str, path: Path, taken: Iterable[str]) -> None:
    """Write the table to ``path``, whole or not at all; raises :class:`BadInput`.

    ``taken`` are the names of the output's own columns, which no input column may have.
    """
    types, rows = CarriedTypes(), 0
    for chunk in chunks(files):
        types.learn(chunk)
        rows += len(chunk.rows)
    if rows == 0:
        raise BadInput(f"--input: no rows in {', '.join(map(str, files))}.")
    carried = types.schema()
    if clash := sorted(set(carried.names) & set(taken)):
        raise BadInput(
            f"--input has columns that the output uses itself: {', '.join(clash)}; rename them."
        )
    schema = pa.schema([*_FIELDS, *(f.with_name(_CARRIED + f.name) for f in carried)])
    schema = schema.with_metadata({"rows": str(rows), "digest": input_digest})
    scratch = path.with_suffix(".part")
    with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for table in _equal_batches(_tables(files, schema, carried)):
            writer.write_table(table, max_chunksize=BATCH_ROWS)
    os.replace(scratch, path)


def _tables(files: list[Path], schema: pa.Schema, carried: pa.Schema) -> Iterator[pa.Table]:
    number = 0
    for chunk in chunks(files):
        try:
            unknown = carried_columns(chunk, carried)
        except (pa.ArrowException, OverflowError) as error:
            raise BadInput(f"--input: rows from {number} on: {error}") from error
        yield pa.table([*_known(chunk, number), *unknown.columns], schema=schema)
        number += len(chunk.rows)


def _known(chunk: Chunk, number: int) -> list[pa.Array]:
    encoder = msgspec.msgpack.Encoder()
    data: list[bytes | None] = []
    reasons: list[str | None] = []
    lengths: list[int] = []
    for offset, fields in enumerate(chunk.rows):
        try:
            if isinstance(fields, str):
                raise BadRow(fields)
            row = parse_row(fields, number + offset)
            data.append(encoder.encode(row))
            reasons.append(None)
            lengths.append(row.length)
        except BadRow as error:
            data.append(None)
            reasons.append(str(error))
            lengths.append(0)
    arrays = zip((data, reasons, lengths), _FIELDS, strict=True)
    return [pa.array(values, field.type) for values, field in arrays]


def _equal_batches(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in single-chunk tables of whole batches, the last one aside."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        whole = len(rest) // BATCH_ROWS * BATCH_ROWS
        if whole:
            rest = rest.combine_chunks()
            yield rest.slice(0, whole)
            rest = rest.slice(whole)
    if rest is not None and len(rest):
        yield rest.combine_chunks()
