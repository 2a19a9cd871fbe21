"""Agents that own their loop: what their clients get at an episode's URL, and what is recorded."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.rollout.recording.process import Limits, run_harness
from tests.launch.rollout.jobs import run, samples, summary, write_jsonl
from tests.launch.rollout.stub import END, NEWLINE, answer_ids, chat_ids, logprob, text_ids

AGENT = f"{sys.executable} {Path(__file__).with_name('plain_agent.py')}"
CLIENTS = f"{sys.executable} -m tests.launch.rollout.recording.recorded_agent"
ROUTES = ("chat", "messages", "responses")
ASKS = ["How warm?", "21 degrees", "Thanks"]
SCRIPT = ['Let me see. CALL(measure, {"unit": "c"})', "It is warm.", "Bye."]


def job(tmp_path: Path, url: str, rows: list[dict[str, Any]], *flags: str) -> list[dict[str, Any]]:
    tmp_path.mkdir(exist_ok=True)
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "p"} | row for row in rows])
    given = flags if "--harness" in flags else ("--harness", AGENT, *flags)
    code = run(source, tmp_path / "out", url, "--logprobs", *given)
    rows = samples(tmp_path / "out")
    assert code == (3 if any(row["error"] for row in rows) else 0)
    return sorted(rows, key=lambda row: (row["row"], row["sample"], row["trajectory"]))


def script(code: str) -> str:
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"


def check(row: dict[str, Any]) -> None:
    """Every turn's tokens are those that the engine was sent and has generated."""
    ids, place = row["token_ids"], row["prompt_tokens"]
    expected_mask = [0] * place
    for number, turn in enumerate(row["turns"]):
        end = place + turn["generated_tokens"]
        assert turn["prompt_tokens"] == place
        expected_mask += [1] * (end - place)
        told = [logprob(ids[:place], i) for i in range(place, end)]
        assert row["logprobs"][place:end] == pytest.approx(told, abs=1e-6)
        if number + 1 < len(row["turns"]):
            following = row["turns"][number + 1]["prompt_tokens"]
            expected_mask += [0] * (following - end)
            place = following
    assert row["loss_mask"] == expected_mask and len(ids) == len(expected_mask)


@pytest.mark.slow
def test_tool_loops_of_three_clients_are_each_a_trajectory_of_the_very_tokens(stub, tmp_path):
    stub.set(script=SCRIPT * 6)
    talks = [(route, stream) for route in ROUTES for stream in (False, True)]
    told = [{"route": r, "stream": s, "asks": ASKS} for r, s in talks]
    rows = job(
        tmp_path, stub.url, [{"conversations": told}], "--harness", CLIENTS, "--max-turns", "18"
    )
    assert [row["trajectory"] for row in rows] == list(range(6))
    for (route, _), row in zip(talks, rows, strict=True):
        check(row)
        assert (row["reward"], row["exit_code"], row["finish_reason"]) == (1, 0, "done")
        assert (len(row["turns"]), row["weight_version"]) == (3, "v1")
        ids, place = row["token_ids"], row["prompt_tokens"]
        roles = ("user", "user") if route == "messages" else ("tool", "user")
        for number, said in enumerate(SCRIPT):
            output = [*text_ids(said), END]
            assert ids[place : place + len(output)] == output
            place += len(output)
            if number < 2:
                new = chat_ids([{"role": roles[number], "content": ASKS[number + 1]}])
                assert ids[place : place + len(new) + 1] == [NEWLINE, *new]
                place += len(new) + 1
        assert place == len(ids)
        assert row["messages"][-1]["role"] == "assistant"


def test_answers_that_were_cut_off_are_closed_once(stub, tmp_path):
    talks = [{"asks": [f"ask {n}.{i}" for i in range(4)]} for n in range(4)]
    rows = job(
        tmp_path, stub.url, [{"conversations": [one]} for one in talks], "--max-new-tokens", "6"
    )
    reasons = {turn["finish_reason"] for row in rows for turn in row["turns"]}
    assert reasons == {"stop", "length"}
    for number, row in enumerate(rows):
        check(row)
        assert len(row["turns"]) == 4
        for turn, following in zip(row["turns"], row["turns"][1:], strict=False):
            begin, end = turn["prompt_tokens"], turn["prompt_tokens"] + turn["generated_tokens"]
            output, _ = answer_ids(row["token_ids"][:begin], 6)
            assert row["token_ids"][begin:end] == output
            closing = [NEWLINE] if output[-1] == END else [END, NEWLINE]
            assert row["token_ids"][end : end + len(closing)] == closing
            assert row["token_ids"][end + len(closing)] != END
            assert following["prompt_tokens"] > end
        assert row["row"] == number


def test_forks_and_sub_agents_are_trajectories_of_their_own(stub, tmp_path):
    stub.set(script=["Yes.", "Two.", "A fork.", "A child.", "Again."])
    child = {"asks": ["Look at this", "and that"]}
    main = {"asks": ["One?", "Two?"], "fork": "Three?"}
    main_row, fork, sub = job(tmp_path, stub.url, [{"conversations": [main, child]}])
    for row in (main_row, fork, sub):
        check(row)
        assert (row["reward"], row["exit_code"], row["sample"]) == (0.5, 0, 0)
    assert [row["trajectory"] for row in (main_row, fork, sub)] == [0, 1, 2]
    assert [len(row["turns"]) for row in (main_row, fork, sub)] == [2, 1, 2]
    # What both have is a prompt to the fork: no token is trained on twice.
    shared = main_row["prompt_tokens"] + main_row["turns"][0]["generated_tokens"]
    assert fork["token_ids"][:shared] == main_row["token_ids"][:shared]
    assert sum(fork["loss_mask"][:shared]) == 0
    assert sum(fork["loss_mask"]) == len(text_ids("A fork.")) + 1
    assert summary(tmp_path / "out")["requests"] == 5
    # An episode of many rows is one sample: the same command has nothing left to do.
    before = stub.counts()["requests"]
    assert (
        run(tmp_path / "in.jsonl", tmp_path / "out", stub.url, "--logprobs", "--harness", AGENT)
        == 0
    )
    assert stub.counts()["requests"] == before


def test_the_jobs_limits_are_the_agents(stub, tmp_path):
    talks = [{"asks": ["a", "b", "c"]}]
    [row] = job(tmp_path / "turns", stub.url, [{"conversations": talks}], "--max-turns", "2")
    assert (row["finish_reason"], row["error"], len(row["turns"])) == ("max_turns", None, 2)
    assert row["exit_code"] == 1 and row["reward"] is None
    flags = ("--max-episode-tokens", str(row["turns"][1]["prompt_tokens"] - 1))
    [row] = job(tmp_path / "tokens", stub.url, [{"conversations": talks}], *flags)
    assert row["finish_reason"] == "max_episode_tokens" and len(row["turns"]) == 1


@pytest.mark.parametrize(
    ("command", "words", "code"),
    [
        ("/no/such/program", "No such file", None),
        (script("import sys; sys.exit('out of cheese')"), "ended with 1: out of cheese", 1),
        (script("print('idle')"), "asked for nothing", 0),
        (
            script("import os; open(os.environ['ROLLOUT_RESULT'], 'w').write('[1]')"),
            "ROLLOUT_RESULT",
            None,
        ),
    ],
)
def test_a_harness_that_fails_fails_its_own_episode(stub, tmp_path, command, words, code):
    [row] = job(tmp_path, stub.url, [{}], "--harness", command)
    assert words in row["error"] and row["exit_code"] == code
    assert (row["finish_reason"], row["turns"], row["token_ids"]) == ("env_error", [], [])


def test_a_harness_has_its_time(stub, tmp_path):
    flags = ("--harness", "sleep 600", "--harness-timeout-s", "0.2")
    [row] = job(tmp_path, stub.url, [{}], *flags)
    assert "took more than 0.2 s" in row["error"] and row["exit_code"] == -signal.SIGTERM


@pytest.mark.asyncio
async def test_a_harness_is_ended_with_all_that_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "600"])
with open({str(pids)!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{child.pid}}\\n")
time.sleep(600)
"""
    limits = Limits(timeout_s=600, output_bytes=1024)
    running = asyncio.create_task(run_harness(script(code), "http://127.0.0.1:1/key", {}, limits))
    while not pids.exists() or not pids.read_text().endswith("\n"):
        await asyncio.sleep(0.02)
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    started = [int(pid) for pid in pids.read_text().split()]
    assert len(started) == 2 and not any(is_alive(pid) for pid in started)


@pytest.mark.asyncio
async def test_the_end_of_an_output_is_kept(tmp_path):
    code = "print('x' * (1 << 20)); print('{\"reward\": 2}')"
    limits = Limits(timeout_s=600, output_bytes=1024)
    ended = await run_harness(script(code), "http://127.0.0.1:1/key", {}, limits)
    assert (ended.exit_code, ended.reward, ended.is_late) == (0, 2.0, False)
    assert len(ended.output) == 1024 and ended.output.startswith("xxx")


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_endpoint_is_its_episodes_and_its_environment_nobody_elses(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "the trainer's")
    monkeypatch.setenv("DUALPATH_NOTHING", "x")
    seen = tmp_path / "seen.json"
    code = f"""
import json, os, urllib.error
from tests.launch.rollout.recording.plain_agent import ask, chat
chat(["a"])
models = ask("/v1/models")
body = {{"model": "any", "messages": [{{"role": "user", "content": "a"}}]}}
tokens = ask("/v1/messages/count_tokens", body)
try:
    os.environ["ROLLOUT_BASE_URL"] += "x"
    ask("/v1/models")
except urllib.error.HTTPError as error:
    assert error.code == 404
open({str(seen)!r}, "w").write(json.dumps([dict(os.environ), models, tokens]))
"""
    job(tmp_path, stub.url, [{"id": "x"}], "--harness", script(code))
    variables, models, tokens = json.loads(seen.read_text())
    url = variables["ROLLOUT_BASE_URL"].removesuffix("x")
    assert url.startswith("http://127.0.0.1:") and variables["ANTHROPIC_BASE_URL"] == url
    assert variables["OPENAI_API_KEY"] == url.rpartition("/")[2] and len(url) > 50
    assert "DUALPATH_NOTHING" not in variables
    assert models["data"][0]["id"] == "stub" and tokens["input_tokens"] > 3
    assert not Path(variables["ROLLOUT_ROW"]).exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--env", "examples.calculator:Calculator"], "the one that owns the loop"),
        (["--record-host", "0.0.0.0"], "--record-host"),
        (["--record-host", "192.0.2.1"], "--record-host"),
        (["--harness", "'"], "--harness"),
    ],
)
def test_harness_settings_that_cannot_work_are_refused(stub, tmp_path, capfd, flags, words):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "p"}])
    given = ["--harness", AGENT, *flags]
    assert run(source, tmp_path / "out", stub.url, *given) == 2
    assert words in capfd.readouterr().err
