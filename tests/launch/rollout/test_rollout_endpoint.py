"""How a job uses its endpoint: load, order, faults, restarts."""

from __future__ import annotations

import contextlib
import threading
import time

import pytest

from tests.launch.rollout.jobs import (
    keys,
    run,
    samples,
    start,
    summary,
    text_rows,
    wait_until,
    write_jsonl,
)
from tests.launch.rollout.stub import stub_process


def test_auto_keeps_as_many_in_flight_as_the_cluster_admits(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(60))
    stub.set(delay_s=0.1, admitted_max=5)
    assert run(source, tmp_path / "out", stub.url) == 0
    found = summary(tmp_path / "out")
    assert found["concurrency"] == 5
    assert stub.counts()["in_flight_max"] == 5


def test_a_full_cluster_and_failing_requests_are_asked_again(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(20))
    stub.set(full=3, fail=2)
    assert run(source, tmp_path / "out", stub.url, "--concurrency", "4") == 0
    found = summary(tmp_path / "out")
    assert (found["refused_429"], found["retries"], found["missing"]) == (3, 2, 0)
    assert sum(row["turns"][0]["attempts"] - 1 for row in samples(tmp_path / "out")) == 5


@pytest.mark.slow
def test_a_restart_of_the_endpoint_in_mid_job(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(60))
    with contextlib.ExitStack() as first:
        stub = first.enter_context(stub_process(delay_s=0.05))
        job = start(source, tmp_path / "out", stub.url, "--concurrency", "4")
        wait_until(lambda: stub.counts()["requests"] >= 15)
        first.close()
        time.sleep(0.5)
        with stub_process(int(stub.url.rpartition(":")[2])):
            _, text = job.communicate(timeout=30)
    assert job.returncode == 0, text
    assert summary(tmp_path / "out")["retries"] >= 4
    assert len(keys(tmp_path / "out")) == 60


def test_of_several_gateways_the_active_one_is_asked_also_once_it_is_another(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(60))
    with contextlib.ExitStack() as first, stub_process(standby=True) as standby:
        active = first.enter_context(stub_process(delay_s=0.05))
        urls = f"{standby.url},{active.url}"
        job = start(source, tmp_path / "out", urls, "--concurrency", "4")
        wait_until(lambda: active.counts()["requests"] >= 15)
        asked = standby.counts()["refused"]
        first.close()
        standby.set(standby=False)
        _, text = job.communicate(timeout=30)
    assert job.returncode == 0, text
    assert asked < 15, "who has answered is asked first"
    assert len(keys(tmp_path / "out")) == 60


@pytest.mark.slow
def test_an_endpoint_that_is_gone_stops_the_job(stub, tmp_path, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(40))
    stub.set(delay_s=0.02)
    asked = stub.counts()["requests"]

    def break_down() -> None:
        wait_until(lambda: stub.counts()["requests"] >= asked + 10)
        stub.set(fail=10**6)

    breaker = threading.Thread(target=break_down)
    breaker.start()
    flags = ("--retry-s", "1", "--concurrency", "2")
    assert run(source, tmp_path / "out", stub.url, *flags) == 1
    breaker.join()
    assert "serves nobody" in capfd.readouterr().err
    kept = keys(tmp_path / "out")
    assert 0 < len(kept) < 40
    stub.set(fail=0)
    assert run(source, tmp_path / "out", stub.url, *flags) == 0
    assert len(keys(tmp_path / "out")) == 40
    assert run(source, tmp_path / "none", "http://127.0.0.1:9") == 1


def test_shared_prompts_are_sent_once_before_their_samples(stub, tmp_path):
    rows = [{"input_ids": [200 + i] * 130} for i in range(6)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    stub.set(delay_s=0.02)
    assert run(source, tmp_path / "out", stub.url, "--n", "4", "--concurrency", "6") == 0
    found = summary(tmp_path / "out")
    assert (found["primes"], found["requests"]) == (6, 24)
    assert all(row["turns"][0]["cached_tokens"] == 128 for row in samples(tmp_path / "out"))
    assert found["hit_rate"] == pytest.approx(24 * 128 / (30 * 130), abs=1e-3)
    assert stub.counts()["in_flight_max"] == 6


@pytest.mark.parametrize("order", ["input", "longest-first", "shuffled"])
def test_the_order_in_which_prompts_start(stub, tmp_path, order):
    rows = [{"input_ids": [200] * (10 + 7 * i % 50)} for i in range(20)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    flags = ("--order", order, "--concurrency", "1", "--seed", "3")
    stub.set(delay_s=0.003)  # starting times are kept in milliseconds
    assert run(source, tmp_path / "out", stub.url, *flags) == 0
    started = sorted(samples(tmp_path / "out"), key=lambda row: row["started_at"])
    numbers, lengths = [r["row"] for r in started], [r["prompt_tokens"] for r in started]
    assert (numbers == list(range(20))) == (order == "input")
    assert (lengths == sorted(lengths, reverse=True)) == (order == "longest-first")
