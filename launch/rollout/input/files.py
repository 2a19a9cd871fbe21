"""The input as it comes: JSONL and Parquet files, read in chunks, whatever their size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from common.json import JsonObject
from launch.rollout.input.rows import KNOWN_COLUMNS

CHUNK_ROWS = 1024


class BadInput(Exception):
    """The input as a whole cannot be used; the text says what to do."""


class Chunk(msgspec.Struct):
    """Consecutive rows. ``rows`` holds each one's fields, or why it could not be read."""

    rows: list[JsonObject | str]
    table: pa.Table | None = None
    """The same rows with their types, where the file has types."""


def input_files(path: Path) -> list[Path]:
    """The files to read, in order; raises :class:`BadInput`."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".parquet"))
        if not files:
            raise BadInput(f"--input {path}: no .jsonl or .parquet file in this folder.")
        return files
    if path.suffix not in (".jsonl", ".parquet"):
        raise BadInput(f"--input {path}: give a .jsonl or .parquet file or a folder of them.")
    if not path.is_file():
        raise BadInput(f"--input {path}: no such file.")
    return [path]


def digest(files: list[Path]) -> str:
    """Of the files' contents in their order; their names do not matter."""
    contents = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            contents.update(hashlib.file_digest(stream, "blake2b").digest())
    return contents.hexdigest()


def chunks(files: list[Path]) -> Iterator[Chunk]:
    """All rows in order; raises :class:`BadInput` where a file is none of its kind."""
    for file in files:
        try:
            yield from _parquet(file) if file.suffix == ".parquet" else _jsonl(file)
        except (pa.ArrowException, OSError) as error:
            raise BadInput(f"--input {file}: {error}") from error


def _parquet(file: Path) -> Iterator[Chunk]:
    with pq.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=CHUNK_ROWS):
            known = [name for name in batch.schema.names if name in KNOWN_COLUMNS]
            rows = batch.select(known).to_pylist() if known else [{}] * batch.num_rows
            yield Chunk(rows, pa.Table.from_batches([batch]))


def _jsonl(file: Path) -> Iterator[Chunk]:
    decoder = msgspec.json.Decoder(JsonObject)
    rows: list[JsonObject | str] = []
    with file.open("rb") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                rows.append(decoder.decode(line))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                rows.append(f"not a JSON object: {error}")
            if len(rows) == CHUNK_ROWS:
                yield Chunk(rows)
                rows = []
    if rows:
        yield Chunk(rows)


class CarriedTypes:
    """The Arrow type of each column that the job does not know, found by reading all rows.

    Values of one column that share no type are kept as JSON text.
    """

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType] = {}

    def learn(self, chunk: Chunk) -> None:
        if chunk.table is not None:
            for field in chunk.table.schema:
                if field.name not in KNOWN_COLUMNS:
                    self._meet(field.name, field.type)
            return
        for name, values in _unknown_columns(chunk).items():
            try:
                self._meet(name, pa.array(values).type)  # infer_type overlooks mixtures
            except (pa.ArrowException, OverflowError):
                self._types[name] = pa.json_()

    def schema(self) -> pa.Schema:
        """Columns without any value become text."""
        types = {n: pa.string() if pa.types.is_null(t) else t for n, t in self._types.items()}
        return pa.schema(types.items())

    def _meet(self, name: str, found: pa.DataType) -> None:
        known = self._types.get(name, found)
        if known == pa.json_():
            return
        pair = [pa.schema([(name, known)]), pa.schema([(name, found)])]
        try:
            self._types[name] = pa.unify_schemas(pair, promote_options="permissive").field(0).type
        except pa.ArrowException:
            self._types[name] = pa.json_()


def carried_columns(chunk: Chunk, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema`` for these rows; null where a row has none."""
    found = _unknown_columns(chunk) if chunk.table is None else {}
    columns = []
    for field in schema:
        if chunk.table is not None and field.name in chunk.table.schema.names:
            column = chunk.table.column(field.name)
            if field.type != pa.json_():
                columns.append(column.cast(field.type))
                continue
            values = column.to_pylist()
        else:
            values = found.get(field.name, [None] * len(chunk.rows))
        columns.append(_array(values, field.type))
    return pa.table(columns, schema=schema)


def _array(values: list[object], kind: pa.DataType) -> pa.Array:
    if kind != pa.json_():
        return pa.array(values, kind)
    texts = [None if v is None else msgspec.json.encode(v).decode() for v in values]
    return pa.ExtensionArray.from_storage(kind, pa.array(texts, pa.string()))


def _unknown_columns(chunk: Chunk) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = {}
    for number, row in enumerate(chunk.rows):
        if isinstance(row, str):
            continue
        for name, value in row.items():
            if name not in KNOWN_COLUMNS:
                columns.setdefault(name, [None] * len(chunk.rows))[number] = value
    return columns
