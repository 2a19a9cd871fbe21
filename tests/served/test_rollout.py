"""Rollout jobs on a real cluster: gateway, engines, agents, store."""

from __future__ import annotations

import json
import random
import signal
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from launch.rollout.env import Done, Reply, Say
from tests.cluster import Cluster, get, post, prompt
from tests.launch.rollout.jobs import (
    kept,
    keys,
    run,
    samples,
    start,
    summary,
    wait_until,
    what_was_sampled,
    write_jsonl,
)
from tests.launch.rollout.recording.recorded_agent import ROUTES as CONVERSATIONS
from tests.launch.rollout.recording.test_recording import CLIENTS
from tests.served.conftest import WITH_THE_CLUSTER

pytestmark = WITH_THE_CLUSTER

PAGE, BLOCK_BYTES = 64, 8192 * 64
TURNS = 3
VOCABULARY = 2048  # of "tiny"
WORDS = "the of and water storage reader block network long time number people".split()


class Questions:
    """Asks something after each turn; the reward counts the turns."""

    def __init__(self, row):
        self.row = row

    async def reply(self, reply: Reply) -> Say | Done:
        if reply.turn + 1 == TURNS:
            return Done(reward=float(TURNS))
        return Say(text=f"And {self.row['topic']}, question {reply.turn}?")


def shown(token: int) -> int:
    """As SGLang names a prompt's token beside its log-probability: it takes the vocabulary's last
    id for the padding of an image (``logprob_result_processor.py``)."""
    return token if token < VOCABULARY - 1 else 0


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def chats(count: int, length: int) -> list[dict]:
    return [
        {
            "messages": [
                {"role": "system", "content": words(length, seed)},
                {"role": "user", "content": f"Say something about {WORDS[seed % len(WORDS)]}."},
            ],
            "topic": WORDS[seed % len(WORDS)],
        }
        for seed in range(count)
    ]


def test_masked_tokens_have_the_logprobs_that_the_engine_recomputes(cluster, tmp_path):
    """Every generated token of every turn: its recorded log-probability is that of a forward
    over the sample's own ids; also of turns that a pause of the engines has cut in two."""
    source = write_jsonl(tmp_path / "in.jsonl", chats(3, 150))
    flags = ("--env", f"{__name__}:Questions", "--n", "2", "--logprobs", "--max-new-tokens", "120")
    job = start(source, tmp_path / "out", cluster.url, *flags, "--temperature", "1.0")
    cluster.wait_until(lambda: running(cluster) > 3, 60, "more in flight than the three prompts")
    cluster.generate(prompt(100, seed=8))  # came later, and has tokens: so have the job's
    try:
        post(f"{cluster.url}/pause_generation", {})
    finally:
        post(f"{cluster.url}/continue_generation", {})
    _, text = job.communicate(timeout=120)
    assert job.returncode == 0, text
    assert summary(tmp_path / "out")["continued"] > 0
    for row in samples(tmp_path / "out"):
        assert sum(row["loss_mask"]) == sum(turn["generated_tokens"] for turn in row["turns"])
        assert len(row["turns"]) == TURNS and row["reward"] == TURNS
        assert row["weight_version"] == "default"
        assert {span["version"] for span in row["weight_versions"]} == {"default"}
        for turn in row["turns"]:
            rest = turn["segments"][1:]
            assert all(segment["cached_tokens"] >= PAGE for segment in rest), "it was a hit"
        check_logprobs(cluster, row)


def running(cluster: Cluster) -> int:
    """Requests that the gateway has begun."""
    (loads,) = json.loads(get(f"{cluster.url}/v1/loads")[1])["loads"]
    return loads["num_running_reqs"]


def check_logprobs(cluster: Cluster, row: dict[str, Any]) -> None:
    ids, mask = row["token_ids"], row["loss_mask"]
    again = cluster.generate(
        ids,
        return_logprob=True,
        logprob_start_len=0,
        sampling_params={"max_new_tokens": 1},
    )
    recomputed = again.body["meta_info"]["input_token_logprobs"]
    assert [token for _, token, _ in recomputed] == [shown(token) for token in ids]
    for place, generated in enumerate(mask):
        if not generated:
            assert row["logprobs"][place] is None
            continue
        # SGLang's is that after the temperature, which is 1 here.
        assert row["logprobs"][place] == pytest.approx(recomputed[place][0], abs=2e-3), place


def test_what_a_run_aborts_is_continued_by_the_next_from_its_kv(cluster, tmp_path):
    """A run that needs one group begins two; the long one is aborted, with what it has."""
    rows = [
        {"input_ids": prompt(3 * PAGE + 5, seed=12), "max_new_tokens": 400},
        {"input_ids": prompt(3 * PAGE + 5, seed=13), "max_new_tokens": 16},
    ]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ("--groups", "1", "--oversample-groups", "1", "--logprobs", "--temperature", "0")
    assert run(source, tmp_path / "out", cluster.url, *flags) == 0
    assert keys(tmp_path / "out") == [(1, 0)]
    (begun,) = kept(tmp_path / "out")
    tokens = len(begun["token_ids"]) - begun["prompt_tokens"]
    assert 0 < tokens < 400 and not begun["finish_reason"]
    cluster.wait_stored()
    assert run(source, tmp_path / "out", cluster.url, *flags) == 0
    long, _ = samples(tmp_path / "out")
    first, second = long["turns"][0]["segments"]
    assert first["generated_tokens"] == tokens and first["finish_reason"] == "abort"
    assert second["cached_tokens"] >= 3 * PAGE
    assert long["token_ids"][: len(begun["token_ids"])] == begun["token_ids"]
    check_logprobs(cluster, long)


def test_agents_that_own_their_loop_are_recorded_to_the_token(cluster, tmp_path):
    """Anthropic's and OpenAI's clients, on three routes, streamed and whole: each conversation is
    one trajectory, whose turns go on from the blocks of those before."""
    asks = [words(120, seed=9), words(30, seed=10), words(20, seed=11)]
    talks = [(route, stream) for route in CONVERSATIONS for stream in (False, True)]
    told = [{"route": route, "stream": stream, "asks": asks} for route, stream in talks]
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "-", "conversations": told}])
    flags = ("--harness", CLIENTS, "--logprobs", "--max-new-tokens", "16", "--max-turns", "18")
    assert run(source, tmp_path / "out", cluster.url, *flags) == 0, samples(tmp_path / "out")
    rows = sorted(samples(tmp_path / "out"), key=lambda row: row["trajectory"])
    assert [(row["trajectory"], len(row["turns"])) for row in rows] == [(n, 3) for n in range(6)]
    for row in rows:
        check_logprobs(cluster, row)
        for turn, following in pairwise(row["turns"]):
            assert following["cached_tokens"] >= turn["prompt_tokens"] // PAGE * PAGE


def samples_kept(output: Path) -> int:
    """In shards or in the journal, of a job that may be running."""
    shards = sum(pq.read_metadata(shard).num_rows for shard in output.glob("*.parquet"))
    try:
        journal = [path.read_bytes() for path in (output / "_job" / "journal").glob("*.journal")]
    except FileNotFoundError:  # it became a shard this very moment
        return 0
    return shards + sum(content.count(b"\n") for content in journal)


def has_kept(output: Path, samples: int) -> bool:
    return samples_kept(output) >= samples


def test_forty_prompts_twice_killed_and_resumed(cluster, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", chats(40, 40))
    flags: tuple[str, ...] = (
        "--n",
        "2",
        "--temperature",
        "0",
        "--max-new-tokens",
        "8",
        "--concurrency",
        "8",
    )
    flags += ("--shard-bytes", "20KB")
    for acknowledged in (15, 50):
        job = start(source, tmp_path / "killed", cluster.url, *flags)
        wait_until(partial(has_kept, tmp_path / "killed", acknowledged), 60)
        job.kill()
        job.communicate(timeout=10)
        assert job.returncode == -signal.SIGKILL
    assert run(source, tmp_path / "killed", cluster.url, *flags) == 0
    assert summary(tmp_path / "killed")["done_before"] > 0
    assert keys(tmp_path / "killed") == [(row, sample) for row in range(40) for sample in (0, 1)]
    assert run(source, tmp_path / "undisturbed", cluster.url, *flags) == 0
    assert what_was_sampled(tmp_path / "killed") == what_was_sampled(tmp_path / "undisturbed")


def test_the_samples_of_a_prompt_read_its_blocks_once(cluster, tmp_path):
    """Of a prompt that is on SSD only: the first request reads each block, its samples none."""
    ids = prompt(20 * PAGE + 10, seed=3)
    cluster.generate(ids)
    cluster.wait_stored()
    cluster.restart_agents()
    cluster.flush_engines()
    source = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": ids}])
    flags = ("--n", "6", "--max-new-tokens", "4", "--concurrency", "6")
    assert run(source, tmp_path / "out", cluster.url, *flags) == 0
    turns = [row["turns"][0] for row in samples(tmp_path / "out")]
    assert [turn["cached_tokens"] for turn in turns] == [20 * PAGE] * 6
    assert [turn["read_bytes"] for turn in turns] == [0] * 6
    found = summary(tmp_path / "out")
    assert (found["primes"], found["read_bytes"]) == (1, 20 * BLOCK_BYTES)


def test_the_gateway_dies_in_mid_job(cluster, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", chats(12, 60))
    flags = ("--temperature", "0", "--max-new-tokens", "24", "--concurrency", "2")
    job = start(source, tmp_path / "out", cluster.url, *flags)
    wait_until(lambda: samples_kept(tmp_path / "out") >= 3, 60)
    cluster.signal("launch.gateway", signal.SIGKILL)
    _, text = job.communicate(timeout=90)
    assert job.returncode == 0, text
    assert summary(tmp_path / "out")["retries"] > 0, text
    assert keys(tmp_path / "out") == [(row, 0) for row in range(12)]
    cluster.wait_complete()
