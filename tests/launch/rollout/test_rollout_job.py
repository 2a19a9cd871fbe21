"""Jobs against a stand-in endpoint: what goes in, what comes out, what may go wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from launch.rollout.__main__ import main
from tests.launch.rollout.jobs import (
    CHAT,
    errors,
    keys,
    run,
    samples,
    summary,
    text_rows,
    write_jsonl,
)
from tests.launch.rollout.stub import answer_ids, chat_ids, decode, logprob, text_ids


def test_the_three_kinds_of_prompt_and_their_sampling(stub, tmp_path):
    rows = [
        {"prompt": "once", "temperature": 0, "max_new_tokens": 3, "stop": "x"},
        {"messages": CHAT, "id": 7, "top_p": 0.5},
        {"input_ids": [101, 102, 103], "extra": {"a": 1}},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    assert run(source, tmp_path / "out", stub.url, "--max-new-tokens", "5", "--logprobs") == 0
    once, chat, ids = samples(tmp_path / "out")
    for row, prompt in ((once, text_ids("once")), (chat, chat_ids(CHAT)), (ids, [101, 102, 103])):
        limit = row["sampling"]["max_new_tokens"]
        output, finish = answer_ids(prompt, limit)
        assert row["token_ids"] == prompt + output
        assert row["prompt_tokens"] == len(prompt)
        assert row["loss_mask"] == [0] * len(prompt) + [1] * len(output)
        assert row["logprobs"][: len(prompt)] == [None] * len(prompt)
        expected = [logprob(prompt, len(prompt) + i) for i in range(len(output))]
        assert row["logprobs"][len(prompt) :] == pytest.approx(expected, abs=1e-6)
        assert row["finish_reason"] == finish
        assert row["messages"][-1] == {
            "role": "assistant",
            "content": decode(output),
            "extra": None,
        }
        assert (row["weight_version"], row["reward"], row["error"]) == ("v1", None, None)
    assert once["sampling"] == {
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 3,
        "seed": None,
        "stop": ["x"],
    }
    assert (once["id"], chat["id"], ids["id"]) == ("0", "7", "2")
    assert (once["prompt"], chat["prompt"]) == ("once", None)
    assert chat["sampling"]["top_p"] == 0.5
    assert ids["extra"] == {"a": 1} and once["extra"] is None


def test_parquet_folders_keep_the_types_of_columns_they_carry(stub, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    when = pa.array([1, 2], pa.timestamp("us"))
    struct = pa.array([[{"role": "user", "content": "a", "name": None}], None])
    table = pa.table({"messages": struct, "prompt": [None, "b"], "when": when, "k": [1, 2]})
    pq.write_table(table, folder / "a.parquet")
    write_jsonl(folder / "b.jsonl", [{"prompt": "c", "k": 1.5}, {"prompt": "d", "odd": [1, "x"]}])
    assert run(folder, tmp_path / "out", stub.url) == 0
    out = pyarrow.dataset.dataset(tmp_path / "out").to_table().sort_by("row")
    assert out.schema.field("when").type == pa.timestamp("us")
    assert out["k"].to_pylist() == [1.0, 2.0, 1.5, None]
    assert out["odd"].to_pylist() == [None, None, None, '[1,"x"]']
    assert out["messages"].to_pylist()[0][0] == {"role": "user", "content": "a", "extra": None}


@pytest.mark.slow
def test_pandas_and_datasets_read_the_output(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(5))
    assert run(source, tmp_path / "out", stub.url, "--n", "2", "--logprobs") == 0
    frame = pandas.read_parquet(tmp_path / "out")
    assert len(frame) == 10 and set(frame["answer"]) == set(range(5))
    import datasets

    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "hf"))
    assert found["train"].num_rows == 10
    assert found["train"][0]["turns"][0]["generated_tokens"] > 0
    outside = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(outside) == ["_job", "part-000000.parquet"]


def test_bad_rows_are_named_and_the_others_sampled(stub, tmp_path):
    rows = [
        "{not json",
        '"a string"',
        {"prompt": "good", "answer": 1},
        {"answer": 2},
        {"prompt": "a", "messages": CHAT},
        {"prompt": ""},
        {"prompt": 5},
        {"messages": [{"content": "no role"}]},
        {"prompt": "a", "temperature": -1},
        {"input_ids": [1, -2]},
        {"prompt": "x" * 500},
        {"prompt": "a", "id": [1]},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    stub.set(refuse_tokens=400)
    assert run(source, tmp_path / "out", stub.url, "--n", "2") == 3
    assert keys(tmp_path / "out") == [(2, 0), (2, 1)]
    reasons = {error["row"]: error["reason"] for error in errors(tmp_path / "out")}
    assert set(reasons) == set(range(12)) - {2}
    for row, words in {0: "JSON", 3: "needs one of", 4: "prompt and messages", 5: "empty"}.items():
        assert words in reasons[row]
    assert "without a role" in reasons[7] and "too long" in reasons[10]
    assert summary(tmp_path / "out")["missing"] == 22
    # What failed is tried again by the next run, and only that.
    stub.set(refuse_tokens=1 << 30)
    assert run(source, tmp_path / "out", stub.url, "--n", "2") == 3
    assert keys(tmp_path / "out") == [(2, 0), (2, 1), (10, 0), (10, 1)]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "absent.jsonl"], "no such file"),
        (["--input", "in.txt"], ".jsonl or .parquet"),
        (["--n", "0"], "--n 0: give 1 or more"),
        (["--concurency", "3"], "--concurrency"),
        (["--concurrency", "some"], "auto"),
        (["--env", "nowhere:Env"], "nowhere"),
        (["--env", "json:loads"], "no method reply"),
        (["--top-p", "0"], "(0, 1]"),
        (["--prefill", "2"], "with --endpoint"),
        (["--overwrite", "--extend"], "the one that you mean"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_a_sentence(stub, tmp_path, capfd, flags, words):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(1))
    assert run(source, tmp_path / "out", stub.url, *flags) == 2
    assert words in capfd.readouterr().err


def test_a_column_named_as_one_of_the_outputs(stub, tmp_path, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a", "reward": 1}])
    assert run(source, tmp_path / "out", stub.url) == 2
    assert "reward; rename" in capfd.readouterr().err


def test_settings_come_from_a_file_too(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(2))
    file = tmp_path / "job.yaml"
    file.write_text(f"input: {source}\nn: 3\nstop: [a, b]\nmax-new-tokens: 4\n")
    flags = ["--config", str(file), "--output", str(tmp_path / "out"), "--endpoint", stub.url]
    assert main(flags) == 0
    assert len(keys(tmp_path / "out")) == 6
    assert samples(tmp_path / "out")[0]["sampling"]["stop"] == ["a", "b"]


def test_a_dry_run_counts_and_shows_the_first_prompt(stub, tmp_path, capfd):
    rows = [{"messages": CHAT}, "broken", {"prompt": "four"}]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    before = stub.counts()["requests"]
    assert run(source, tmp_path / "out", stub.url, "--n", "4", "--dry-run") == 3
    text = capfd.readouterr().err
    tokens = len(chat_ids(CHAT)) + 4
    assert "3 rows in 1 files, 1 of them bad; 2 x 4 = 8 samples" in text
    assert f"prompts: {tokens} tokens" in text
    assert "system:Be brief.user:Hello?assistant:" in text and "row 1" in text
    assert not (tmp_path / "out").exists()
    assert stub.counts()["requests"] == before


@pytest.mark.slow
def test_a_hundred_thousand_rows_in_bounded_memory(tmp_path):
    """Peak memory hardly depends on the number of rows."""
    peaks = {}
    for rows in (5_000, 100_000):
        source, output = tmp_path / f"{rows}.jsonl", tmp_path / f"out-{rows}"
        with source.open("w") as file:
            for number in range(rows):
                file.write(f'{{"input_ids": [{number % 9000}, 7], "note": "{number:0100}"}}\n')
        script = Path(__file__).with_name("large.py")
        command = [sys.executable, str(script), str(source), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        peaks[rows] = int(done.stdout)
        assert sum(pq.read_metadata(p).num_rows for p in output.glob("*.parquet")) == rows
        assert len(list(output.glob("*.parquet"))) > rows // 30_000
    assert peaks[100_000] < 300 << 20, peaks
    assert peaks[100_000] - peaks[5_000] < 60 << 20, peaks
