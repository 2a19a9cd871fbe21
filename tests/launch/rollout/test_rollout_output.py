"""The journal and the shards, cut off anywhere."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.rollout.input.files import input_files
from launch.rollout.input.prompt_table import PromptTable, build_table
from launch.rollout.input.rows import Sampling
from launch.rollout.output import kept
from launch.rollout.output.schema import TAKEN_NAMES, Sample, Turn
from launch.rollout.output.shards import Output
from tests.examples import examples
from tests.launch.rollout.jobs import text_rows, write_jsonl

ROWS, N = 5, 2
ALL = [(row, sample) for row in range(ROWS) for sample in range(N)]


def make_sample(row: int, number: int) -> Sample:
    return Sample(
        row=row,
        sample=number,
        id=f"r{row}",
        prompt="p",
        messages=[{"role": "assistant", "content": "é\n\U0001f600"}],
        token_ids=[5, 6, 7, row],
        logprobs=[-0.5, -0.25],
        prompt_tokens=2,
        finish_reason="stop",
        reward=None,
        error=None,
        turns=[Turn(2, 4, 2, 0, "stop", "v1", 1, 0, 0.1)],
        sampling=Sampling(1.0, 1.0, 4, None, []),
        started_at_s=1.5,
        seconds=0.1,
    )


def new_folder(folder: Path) -> PromptTable:
    (folder / "_job").mkdir()
    source = write_jsonl(folder / "_job" / "in.jsonl", text_rows(ROWS))
    build_table(input_files(source), "", folder / "_job" / "rows", TAKEN_NAMES)
    return PromptTable(folder / "_job" / "rows")


def sampled(folder: Path) -> list[tuple[int, int]]:
    tables = [pq.read_table(shard) for shard in folder.glob("*.parquet")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert all(row["answer"] == row["row"] for row in rows)
    return sorted((row["row"], row["sample"]) for row in rows)


@examples(20)
@given(
    order=st.permutations(ALL),
    cut=st.floats(0, 1),
    shard_bytes=st.sampled_from([1, 900, 1 << 20]),
    sealed=st.booleans(),
)
def test_a_journal_cut_anywhere_loses_only_the_line_that_was_cut(order, cut, shard_bytes, sealed):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = new_folder(folder)
        output = Output(folder, table, N, shard_bytes)
        for key in order[:7]:
            if (full := output.add([make_sample(*key)])) is not None and sealed:
                output.seal(full)
        last = max((folder / "_job" / "journal").glob("*.journal"))
        content = last.read_bytes()
        kept_bytes = int(cut * len(content))
        last.write_bytes(content[:kept_bytes])
        lost = content.count(b"\n") - content[:kept_bytes].count(b"\n")

        again = Output(folder, table, N, shard_bytes)
        assert int(again.done.sum()) == 7 - lost
        for row, number in order:
            if not again.done[row, number]:
                again.add([make_sample(row, number)])
        again.finish()
        assert sampled(folder) == ALL


STEPS = st.one_of(
    st.tuples(st.sampled_from(ALL), st.sampled_from(["", "stop"])),
    st.integers(0, ROWS - 1),
    st.just("open again"),
)


@examples(50)
@given(st.lists(STEPS, max_size=40), st.integers(0, 2000))
def test_what_is_kept_is_what_was_added_last_and_not_forgotten(steps, compact_bytes):
    """Also where the file is written anew now and then; what is done is not known any more."""
    done = np.zeros((ROWS, N), np.bool_)
    expected: dict[int, dict[int, str]] = {}
    with tempfile.TemporaryDirectory() as name, patch.object(kept, "COMPACT_BYTES", compact_bytes):
        store = kept.Kept(Path(name) / "kept", done)
        for step in steps:
            if isinstance(step, int):
                store.forget(step)
                expected.pop(step, None)
                done[step] = True
            elif step == "open again":
                store.file.close()
                store = kept.Kept(Path(name) / "kept", done)
                reasons = [r for row in expected.values() for r in row.values()]
                assert store.whole == sum(map(bool, reasons))
            elif not done[step[0][0]].any():
                (row, number), reason = step
                sample = make_sample(row, number)
                sample.finish_reason = reason
                store.add(sample)
                expected.setdefault(row, {})[number] = reason
            assert sorted(store.rows()) == sorted(expected)
        found = {r: {s.sample: s.finish_reason for s in store.of(r)} for r in range(ROWS)}
        assert {row: samples for row, samples in found.items() if samples} == expected
        store.close()
        assert (Path(name) / "kept").exists() == bool(expected)


def test_a_shard_that_was_renamed_before_its_segment_went(tmp_path):
    table = new_folder(tmp_path)
    output = Output(tmp_path, table, N, 1)
    segment = output.add([make_sample(0, 0)])
    assert segment is not None
    content = segment.read_bytes()
    output.seal(segment)
    segment.write_bytes(content)  # the kill came before its end
    again = Output(tmp_path, table, N, 1)
    assert not segment.exists()
    again.finish()
    assert sampled(tmp_path) == [(0, 0)]


def test_a_sample_is_taken_once(tmp_path):
    output = Output(tmp_path, new_folder(tmp_path), N, 1 << 20)
    output.add([make_sample(1, 1)])
    with pytest.raises(ValueError, match="is done already"):
        output.add([make_sample(1, 1)])
