"""A prompt's samples as one group: judged, written, over-sampled, dropped."""

from __future__ import annotations

import asyncio
import json
import random
import re
import shlex
import signal
import time
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from launch.rollout.__main__ import main
from launch.rollout.groups.hooks import WholeGroup
from tests.launch.rollout.jobs import (
    CHAT,
    dropped,
    errors,
    kept,
    keys,
    run,
    samples,
    start,
    summary,
    text_rows,
    wait_until,
    what_was_sampled,
    write_jsonl,
)

HERE = __name__
COMMAND = r"^    python -m launch\.rollout --input examples.*(?:\n {8}.*)*"
DOCS = Path("docs/rollout.md").read_text()


def answer_of(group: WholeGroup) -> int:
    answer = group.row["answer"]
    assert isinstance(answer, int)
    return answer


def by_number(group: WholeGroup) -> list[float]:
    assert [s.sample for s in group.samples] == list(range(len(group.samples)))
    return [answer_of(group) + sample.sample / 10 for sample in group.samples]


async def odd_rows(group: WholeGroup) -> bool:
    assert all(sample.reward is not None for sample in group.samples)
    return answer_of(group) % 2 == 1


def broken(group: WholeGroup) -> bool:
    raise KeyError("no such column")


async def endless(group: WholeGroup) -> bool:
    await asyncio.Event().wait()
    return True


def too_few(group: WholeGroup) -> list[float]:
    return [1.0]


def test_a_shard_has_whole_groups(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(5))
    flags = ("--n", "3", "--shard-bytes", "1")
    assert run(source, tmp_path / "out", stub.url, *flags) == 0
    shards = [pq.read_table(s).to_pylist() for s in (tmp_path / "out").glob("*.parquet")]
    assert sorted([(r["row"], r["sample"]) for r in shard] for shard in shards) == [
        [(row, sample) for sample in range(3)] for row in range(5)
    ]


def test_groups_are_rewarded_and_filtered_as_wholes(stub, tmp_path, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(5))
    flags = ("--n", "3", "--group-reward", f"{HERE}:by_number", "--filter", f"{HERE}:odd_rows")
    assert run(source, tmp_path / "out", stub.url, *flags) == 0
    rewards = {(r["row"], r["sample"]): r["reward"] for r in samples(tmp_path / "out")}
    assert rewards == {(row, s): row + s / 10 for row in (1, 3) for s in range(3)}
    gone = {line["row"]: line for line in dropped(tmp_path / "out")}
    assert set(gone) == {0, 2, 4} and gone[2]["rewards"] == [2.0, 2.1, 2.2]
    assert gone[2]["reason"] == "filter" and gone[2]["samples"] == [0, 1, 2]
    found = summary(tmp_path / "out")
    assert (found["groups"], found["done"], found["dropped"]) == (2, 6, 9)
    # What was dropped is not made again.
    requests = stub.counts()["requests"]
    assert run(source, tmp_path / "out", stub.url, *flags) == 0
    assert stub.counts()["requests"] == requests and kept(tmp_path / "out") == []
    assert "all 15 samples are there already, or dropped (9)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "hook", "words"),
    [
        ("--filter", "broken", "row r0: KeyError: 'no such column'"),
        ("--group-reward", "too_few", "not 2 numbers for row r0"),
        ("--filter", "endless", "row r0: no answer within 0.3 s"),
    ],
)
def test_a_hook_that_fails_stops_the_job_and_loses_nothing(
    stub, tmp_path, capfd, flag, hook, words
):
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(1)), tmp_path / "out"
    limit = ("--group-timeout-s", "0.3") if hook == "endless" else ()
    assert run(source, output, stub.url, "--n", "2", flag, f"{HERE}:{hook}", *limit) == 1
    assert words in capfd.readouterr().err
    requests = stub.counts()["requests"]
    assert len(kept(output)) == 2
    assert run(source, output, stub.url, "--n", "2", "--extend") == 0
    assert keys(output) == [(0, 0), (0, 1)] and kept(output) == []
    assert stub.counts()["requests"] == requests


def test_a_group_that_lacks_a_sample(stub, tmp_path):
    """Is written without it, and it is tried again; unless somebody judges whole groups."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": CHAT, "answer": 1}])
    talker = "tests.launch.rollout.test_rollout_episodes:Talker"
    flags = ("--n", "2", "--env", talker, "--concurrency", "1", "--max-turns", "2")
    for name, more, lacking in (
        ("any", (), [0]),
        ("judged", ("--filter", f"{HERE}:odd_rows"), [1]),
    ):
        stub.set(script=["x" * 400, "short", "short"], refuse_tokens=400)
        output = tmp_path / name
        assert run(source, output, stub.url, *flags, *more) == 3
        assert keys(output) == ([] if more else [(0, 1)])
        assert [e["samples"] for e in errors(output)] == [lacking]
        assert [s["sample"] for s in kept(output)] == ([1] if more else [])
        stub.set(script=[], refuse_tokens=1 << 30)
        requests = stub.counts()["requests"]
        reward = ("--group-reward", f"{HERE}:by_number") if more else ()
        extend = ("--extend",) if more else ()
        assert run(source, output, stub.url, *flags, *more, *reward, *extend) == 0
        assert keys(output) == [(0, 0), (0, 1)]
        assert stub.counts()["requests"] == requests + 2


def test_enough_groups_end_a_run_and_the_next_goes_on_with_the_rest(stub, tmp_path):
    """Of six rows two are slow: the run that needs three groups aborts what it has of them."""
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(6)), tmp_path / "out"
    flags = ("--n", "2", "--max-new-tokens", "12", "--temperature", "0", "--logprobs")
    assert run(source, tmp_path / "undisturbed", stub.url, *flags) == 0
    stub.set(slow=["0.1.", "2.0.", "2.1."], cut_tokens=3)
    before = stub.counts()
    three = ("--groups", "3", "--oversample-groups", "2", "--concurrency", "8")
    assert run(source, output, stub.url, *flags, *three) == 0
    assert keys(output) == [(row, sample) for row in (1, 3, 4) for sample in (0, 1)]
    found = summary(output)
    assert (found["groups"], found["aborted"]) == (3, 3)
    written = set(keys(output))
    there = {k: s for s in kept(output) if (k := (s["row"], s["sample"])) not in written}
    assert {key for key, s in there.items() if s["finish_reason"]} == {(0, 0)}
    begun = {key: s for key, s in there.items() if not s["finish_reason"]}
    assert set(begun) == {(0, 1), (2, 0), (2, 1)}
    assert all(len(s["token_ids"]) == s["prompt_tokens"] + 3 for s in begun.values())

    stub.set(slow=[])
    assert run(source, output, stub.url, *flags, *three) == 0
    assert stub.counts()["continued"] - before.get("continued", 0) == 3
    assert what_was_sampled(output) == what_was_sampled(tmp_path / "undisturbed")
    assert kept(output) == []
    cut = [row for row in samples(output) if len(row["turns"][0]["segments"]) == 2]
    assert [(row["row"], row["sample"]) for row in cut] == [(0, 1), (2, 0), (2, 1)]


def test_what_is_not_to_be_kept_is_begun_anew(stub, tmp_path):
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(2)), tmp_path / "out"
    stub.set(slow=["0."])
    flags = ("--groups", "1", "--oversample-groups", "1", "--concurrency", "8")
    assert run(source, output, stub.url, *flags, "--drop-partial") == 0
    assert keys(output) == [(1, 0)] and kept(output) == []
    stub.set(slow=[])
    assert run(source, output, stub.url, *flags) == 0
    assert [len(row["turns"][0]["segments"]) for row in samples(output)] == [1, 1]


def test_more_samples_than_needed_and_the_slow_ones_are_left(stub, tmp_path):
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(3)), tmp_path / "out"
    stub.set(slow=["0.0.", "1.2."])
    flags = ("--n", "2", "--oversample-samples", "1", "--concurrency", "16")
    assert run(source, output, stub.url, *flags, "--group-reward", f"{HERE}:by_number") == 0
    assert keys(output) == [(row, sample) for row in range(3) for sample in range(2)]
    assert summary(output)["missing"] == 0 and kept(output) == []
    rewards = [row["reward"] for row in samples(output)]
    assert rewards == pytest.approx([row + s / 10 for row in range(3) for s in range(2)])


@pytest.mark.slow
def test_killed_at_random_points_each_group_is_written_or_dropped_once(stub, tmp_path):
    """With samples beyond those that are needed, a reward and a filter of groups."""
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(60)), tmp_path / "out"
    flags = ["--n", "2", "--oversample-samples", "1", "--concurrency", "4"]
    flags += ["--group-reward", f"{HERE}:by_number", "--filter", f"{HERE}:odd_rows"]
    flags += ["--shard-bytes", "3000"]
    stub.set(delay_s=0.25)  # so that even a fast machine is not through before the last kill
    chance = random.Random(7)
    for kill in range(5):
        job = start(source, output, stub.url, *flags)
        time.sleep(0.6 + chance.uniform(0.0, 0.4))
        job.kill()
        job.communicate(timeout=10)
        assert job.returncode == -signal.SIGKILL, f"it ended before kill {kill}"
    stub.set(delay_s=0.0)
    assert run(source, output, stub.url, *flags) == 0
    assert keys(output) == [(row, sample) for row in range(1, 60, 2) for sample in range(2)]
    assert sorted(line["row"] for line in dropped(output)) == list(range(0, 60, 2))
    rewards = [row["reward"] for row in samples(output)]
    assert rewards == pytest.approx([row + s / 10 for row in range(1, 60, 2) for s in range(2)])
    assert kept(output) == []


def has_kept(output: Path, samples: int) -> bool:
    return len(kept(output)) == samples


@pytest.mark.slow
def test_a_group_that_became_stale_is_dropped_or_finished_as_is_set(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(1))
    for name in ("drop", "finish"):
        stub.set(slow=["0.1."], weight_version="v1")
        output = tmp_path / name
        flags = ("--n", "2", "--max-staleness-commits", "0", "--on-stale", name)
        job = start(source, output, stub.url, *flags)
        wait_until(partial(has_kept, output, 1))
        stub.set(weight_version="v2")
        if name == "finish":
            stub.set(slow=[])
        _, text = job.communicate(timeout=30)
        assert job.returncode == 0, text
    assert samples(tmp_path / "drop") == []
    assert [line["reason"] for line in dropped(tmp_path / "drop")] == ["stale"]
    first, second = samples(tmp_path / "finish")
    assert (first["weight_version"], first["staleness_commits"]) == ("v1", 1)
    assert (second["weight_version"], second["staleness_commits"]) == ("v2", 0)


def test_the_example_of_the_docs(stub, tmp_path):
    """Of its two prompts one has samples that differ; their rewards are the advantages."""
    (command,) = re.findall(
        r"^    python -m launch\.rollout --input examples.*(?:\n {8}.*)*", DOCS, re.M
    )
    flags = shlex.split(command.replace("\\\n", " "))[3:]
    flags[flags.index("--output") + 1] = str(tmp_path / "out")
    rows = Path("examples/calculator.jsonl").read_text().splitlines()[:2]
    flags[flags.index("--input") + 1] = str(write_jsonl(tmp_path / "in.jsonl", rows))
    n = int(flags[flags.index("--n") + 1])
    answer = [f"ANSWER: {json.loads(row)['answer']}" for row in rows]
    stub.set(script=[answer[0], *["ANSWER: -1"] * (n - 1), *[answer[1]] * n])
    assert main([*flags, "--endpoint", stub.url, "--concurrency", "1"]) == 0
    rewards = [row["reward"] for row in samples(tmp_path / "out")]
    assert rewards == [1 - 1 / n] + [-1 / n] * (n - 1)
    assert [(line["row"], line["reason"]) for line in dropped(tmp_path / "out")] == [(1, "filter")]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--filter", "nowhere:fn"], "nowhere"),
        (["--group-reward", "json"], "module:function"),
        (["--filter", "json:__name__"], "no function"),
        (["--oversample-groups", "2"], "say how many are needed"),
        (["--max-staleness-commits", "-1"], "give 0 or more"),
        (["--on-stale", "eat"], "finish"),
    ],
)
def test_settings_of_groups_that_cannot_work(stub, tmp_path, capfd, flags, words):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(1))
    assert run(source, tmp_path / "out", stub.url, *flags) == 2
    assert words in capfd.readouterr().err
