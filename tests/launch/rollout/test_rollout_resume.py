"""A job may end at any moment: each sample is there once in the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.launch.rollout.jobs import (
    argv,
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

KILLS = 12
ROWS, N = 120, 2


def all_keys(rows: int, n: int) -> list[tuple[int, int]]:
    return [(row, sample) for row in range(rows) for sample in range(n)]


@pytest.mark.slow
def test_killed_at_random_points_it_completes_what_is_missing(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(ROWS))
    flags: tuple[str, ...] = (
        "--n",
        str(N),
        "--temperature",
        "0",
        "--max-new-tokens",
        "9",
        "--logprobs",
    )
    flags += ("--concurrency", "4", "--shard-bytes", "3000")
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "killed"
    assert run(source, undisturbed, stub.url, *flags) == 0
    stub.set(delay_s=0.25)  # so that even a fast machine is not through before the last kill
    chance = random.Random(5)
    before = stub.counts()["requests"]
    for kill in range(KILLS):
        job = start(source, output, stub.url, *flags)
        time.sleep(0.5 + chance.uniform(0.0, 0.3))
        job.kill()
        job.communicate(timeout=10)
        assert job.returncode == -signal.SIGKILL, f"it ended before kill {kill}"
    stub.set(delay_s=0.0)
    assert run(source, output, stub.url, *flags) == 0
    assert keys(output) == all_keys(ROWS, N)
    assert what_was_sampled(output) == what_was_sampled(undisturbed)
    assert list((output / "_job" / "journal").iterdir()) == []
    # Only what was in flight at each kill was generated again.
    assert stub.counts()["requests"] - before <= ROWS * N + KILLS * 4
    assert len(list(output.glob("*.parquet"))) > 3
    # There is nothing left to do, and nothing is done.
    requests = stub.counts()["requests"]
    assert run(source, output, stub.url, *flags) == 0
    assert stub.counts()["requests"] == requests


@pytest.mark.slow
def test_a_signal_ends_it_with_everything_in_shards(stub, tmp_path):
    rows = 400  # 10 s of work
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(rows))
    stub.set(delay_s=0.1)
    enough = stub.counts()["requests"] + 10
    job = start(source, tmp_path / "out", stub.url, "--concurrency", "4")
    wait_until(lambda: stub.counts()["requests"] >= enough)
    job.terminate()
    _, text = job.communicate(timeout=10)
    assert job.returncode == 130 and "same command goes on" in text, text
    done = samples(tmp_path / "out")
    assert 0 < len(done) < rows
    assert summary(tmp_path / "out")["done"] == len(done)
    stub.set(delay_s=0.0)
    assert run(source, tmp_path / "out", stub.url) == 0
    assert keys(tmp_path / "out") == all_keys(rows, 1)


@pytest.mark.slow
def test_two_jobs_on_one_output(stub, tmp_path, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(30))
    stub.set(delay_s=0.1)
    first = start(source, tmp_path / "out", stub.url, "--concurrency", "2")
    try:
        wait_until((tmp_path / "out" / "_job" / "manifest").exists)
        assert run(source, tmp_path / "out", stub.url) == 2
        assert "another job is writing there" in capfd.readouterr().err
    finally:
        stub.set(delay_s=0.0)
        first.communicate(timeout=20)
    assert first.returncode == 0
    assert keys(tmp_path / "out") == all_keys(30, 1)


def test_changed_settings_need_extend_or_overwrite(stub, tmp_path, capfd):
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(4)), tmp_path / "out"
    flags: tuple[str, ...] = (
        "--temperature",
        "0",
        "--max-new-tokens",
        "5",
    )
    assert run(source, output, stub.url, *flags) == 0
    first = what_was_sampled(output)
    assert run(source, output, stub.url, "--n", "2", *flags[:3], "6") == 2
    refusal = capfd.readouterr().err
    assert "--n from 1 to 2" in refusal and "--max-new-tokens from 5 to 6" in refusal
    assert "--extend" in refusal and "--overwrite" in refusal

    assert run(source, output, stub.url, "--n", "2", *flags, "--extend") == 0
    assert [row for row in what_was_sampled(output) if row["sample"] == 0] == first
    assert keys(output) == all_keys(4, 2)

    write_jsonl(source, text_rows(6))
    assert run(source, output, stub.url, "--n", "2", *flags) == 2
    assert "the rows of --input" in capfd.readouterr().err
    assert run(source, output, stub.url, "--n", "2", *flags, "--extend") == 0
    assert keys(output) == all_keys(6, 2)
    write_jsonl(source, [{"prompt": "another"}, *text_rows(6)])
    assert run(source, output, stub.url, "--n", "2", *flags, "--extend") == 2
    assert "row 0 of --input is not the one" in capfd.readouterr().err

    assert run(source, output, stub.url, "--overwrite") == 0
    assert keys(output) == all_keys(7, 1)
    stub.set(model="other")
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "another"}, *text_rows(7)])
    assert run(source, output, stub.url, "--overwrite") == 0


def test_another_model_is_refused(stub, tmp_path, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", ["broken", *text_rows(2)])
    assert run(source, tmp_path / "out", stub.url) == 3
    stub.set(model="other")
    assert run(source, tmp_path / "out", stub.url) == 2
    assert "samples of model stub; the endpoint serves other" in capfd.readouterr().err


def test_a_strangers_folder_is_left_alone(stub, tmp_path, capfd):
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(2))
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    for flag in ("--extend", "--overwrite"):
        assert run(source, output, stub.url, flag) == 2
    assert "thesis.txt" in capfd.readouterr().err
    assert (output / "thesis.txt").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_stops_it_and_it_goes_on_with_room(stub, tmp_path):
    disk, source = tmp_path / "disk", write_jsonl(tmp_path / "in.jsonl", text_rows(400))
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        job = start(source, disk / "out", stub.url, "--logprobs")
        _, text = job.communicate(timeout=30)
        assert job.returncode == 1, text
        assert "No space left" in text and "same command goes on" in text
        kept = (disk / "out" / "_job" / "journal" / "000000.journal").read_bytes().count(b"\n")
        assert kept > 20
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert run(source, disk / "out", stub.url, "--logprobs") == 0
        assert summary(disk / "out")["done_before"] == kept
        assert keys(disk / "out") == all_keys(400, 1)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_a_full_disk(stub, tmp_path):
    """The same where mounting is not allowed: EFBIG instead of ENOSPC."""
    source = write_jsonl(tmp_path / "in.jsonl", text_rows(300))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from launch.rollout.__main__ import main;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, resource.RLIM_INFINITY));"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *argv(source, tmp_path / "out", stub.url)]
    job = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert job.returncode == 1, job.stderr
    assert "File too large" in job.stderr
    assert run(source, tmp_path / "out", stub.url) == 0
    assert keys(tmp_path / "out") == all_keys(300, 1)
