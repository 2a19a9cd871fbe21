"""Episodes of one and of many turns, against a stand-in endpoint."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from launch.rollout.env import Done, Reply, Say
from tests.launch.rollout.jobs import (
    CHAT,
    run,
    samples,
    summary,
    write_jsonl,
)
from tests.launch.rollout.stub import END, answer_ids, chat_ids, decode, logprob, text_ids


class Talker:
    """Says something for ``turns`` turns; fails where the row asks for it."""

    closed = 0

    def __init__(self, row):
        self.row = row
        if row.get("fail") == "build":
            raise KeyError("no such puzzle")

    async def reply(self, reply: Reply) -> Say | Done | str:
        assert reply.text == decode(reply.token_ids)
        if self.row.get("fail") == "reply" and reply.turn == 1:
            raise ValueError("out of cheese")
        if self.row.get("fail") == "slow":
            await asyncio.sleep(60)
        if self.row.get("fail") == "nonsense":
            return "hm"
        if reply.turn + 1 == self.row.get("length", 3):
            return Done(reward=float(reply.turn))
        return Say(**self.row.get("say") or {"text": f"go on {reply.turn}"})

    async def close(self):
        Talker.closed += 1


TALKER = f"{__name__}:Talker"


def test_an_episode_extends_its_tokens_as_the_chat_template_would(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": CHAT, "length": 4}])
    flags = ("--n", "8", "--env", TALKER, "--logprobs", "--max-new-tokens", "6")
    assert run(source, tmp_path / "out", stub.url, *flags) == 0
    for row in samples(tmp_path / "out"):
        assert (row["finish_reason"], row["reward"]) == ("done", 3.0)
        place, mask = row["prompt_tokens"], row["loss_mask"]
        for number, turn in enumerate(row["turns"]):
            prompt = row["token_ids"][:place]
            output, _ = answer_ids(prompt, 6)
            end = place + len(output)
            assert turn["prompt_tokens"] == place
            assert row["token_ids"][place:end] == output and mask[place:end] == [1] * len(output)
            expected = [logprob(prompt, i) for i in range(place, end)]
            assert row["logprobs"][place:end] == pytest.approx(expected, abs=1e-6)
            place = end
            if number < 3:
                # Closed once, whether or not the model did it itself.
                closing = [] if output[-1] == END else [END]
                said = chat_ids([{"role": "user", "content": f"go on {number}"}])
                follows = [*closing, 3, *said]
                assert row["token_ids"][place : place + len(follows)] == follows
                assert not any(mask[place : place + len(follows)])
                place += len(follows)
        assert place == len(row["token_ids"])
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system", "user", *["assistant", "user"] * 3, "assistant"]


def test_text_rows_are_followed_by_plain_text_or_by_ids(stub, tmp_path):
    rows = [{"prompt": "a", "length": 2}, {"input_ids": [150], "length": 2}]
    rows[1]["say"] = {"token_ids": [111, 112]}
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    assert run(source, tmp_path / "out", stub.url, "--env", TALKER, "--max-new-tokens", "4") == 0
    text, ids = samples(tmp_path / "out")
    first, _ = answer_ids(text_ids("a"), 4)
    assert text["token_ids"][1 + len(first) :][:7] == text_ids("go on 0")
    first, _ = answer_ids([150], 4)
    assert ids["token_ids"][1 + len(first) :][:2] == [111, 112]


def test_an_environment_that_fails_fails_its_own_episode(stub, tmp_path):
    kinds = ["build", "reply", "slow", "nonsense", None]
    rows: list[dict[str, Any]] = [{"messages": CHAT, "fail": kind} for kind in kinds]
    rows.append({"prompt": "text", "say": {"messages": CHAT}})
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    Talker.closed = 0
    flags = ("--env", TALKER, "--env-timeout-s", "0.3")
    assert run(source, tmp_path / "out", stub.url, *flags) == 3
    build, reply, slow, nonsense, good, misplaced = samples(tmp_path / "out")
    assert "no such puzzle" in build["error"] and build["turns"] == []
    assert reply["error"] == "ValueError: out of cheese" and len(reply["turns"]) == 2
    assert slow["error"] == "no reply within 0.3 s"
    assert "neither Say nor Done" in nonsense["error"]
    assert "no chat" in misplaced["error"]
    assert good["error"] is None and good["finish_reason"] == "done"
    assert {row["finish_reason"] for row in (build, reply, slow, nonsense)} == {"env_error"}
    assert all(row["reward"] is None for row in (build, reply, slow, nonsense))
    assert Talker.closed == 5
    assert summary(tmp_path / "out")["failed"] == 5
    # Failed episodes are samples: nothing is missing, and the exit code still tells.
    assert run(source, tmp_path / "out", stub.url, *flags) == 3


class Sleeper:
    """Its tool hangs in the first turn; it is asked again in the next."""

    def __init__(self, row):
        self.calls = 0

    async def reply(self, reply: Reply) -> Say | Done:
        self.calls += 1
        if self.calls == 1:
            await asyncio.Event().wait()
        return Done(reward=float(self.calls))


class Apologist(Sleeper):
    async def timed_out(self, reply: Reply) -> Say | Done:
        return Say(text=f"turn {reply.turn}: the tool was stopped")


@pytest.mark.parametrize(
    ("env", "what", "finish", "said"),
    [
        ("Sleeper", "fail", "env_error", None),
        ("Sleeper", "end", "env_timeout", None),
        ("Sleeper", "observe", "done", "No answer within 0.2 s."),
        ("Apologist", "observe", "done", "turn 0: the tool was stopped"),
    ],
)
def test_a_tool_that_takes_too_long(stub, tmp_path, env, what, finish, said):
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": CHAT}])
    flags = ("--env", f"{__name__}:{env}", "--env-timeout-s", "0.2", "--on-env-timeout", what)
    expected = 3 if what == "fail" else 0
    assert run(source, tmp_path / "out", stub.url, *flags) == expected
    (row,) = samples(tmp_path / "out")
    assert row["finish_reason"] == finish
    assert (row["error"] is None) == (what != "fail")
    assert row["reward"] == (2.0 if said else None)
    late = [turn["env_timed_out"] for turn in row["turns"]]
    assert late == ([True, False] if said else [what == "end"])
    if said:
        assert row["messages"][-2]["content"] == said
        told = chat_ids([{"role": "user", "content": said}])
        begin = row["turns"][1]["prompt_tokens"] - len(told)
        assert row["token_ids"][begin : begin + len(told)] == told
        assert not any(row["loss_mask"][begin : begin + len(told)])


def test_limits_of_turns_and_tokens_end_an_episode(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": CHAT, "length": 99}])
    flags = ("--env", TALKER, "--max-new-tokens", "6")
    assert run(source, tmp_path / "turns", stub.url, *flags, "--max-turns", "2") == 0
    (turns,) = samples(tmp_path / "turns")
    assert turns["finish_reason"] == "max_turns" and len(turns["turns"]) == 2
    assert turns["loss_mask"][-1] == 1  # nothing is said that no turn follows
    limit = str(turns["prompt_tokens"] + 50)
    assert run(source, tmp_path / "tokens", stub.url, *flags, "--max-episode-tokens", limit) == 0
    (tokens,) = samples(tmp_path / "tokens")
    assert tokens["finish_reason"] == "max_episode_tokens"


def test_the_calculator_example(stub, tmp_path):
    source = Path("examples/calculator.jsonl")
    script = ["CALC(12 * 7)", "hm", "CALC(1 / 0)", "CALC(import os)", "ANSWER: 84"]
    stub.set(script=script)
    one = write_jsonl(tmp_path / "in.jsonl", [json.loads(source.read_text().splitlines()[0])])
    flags = ("--env", "examples.calculator:Calculator", "--max-turns", "6")
    assert run(one, tmp_path / "out", stub.url, *flags) == 0
    (row,) = samples(tmp_path / "out")
    said = [m["content"] for m in row["messages"] if m["role"] == "user"][1:]
    assert said[0] == "12 * 7 = 84"
    assert "Write CALC" in said[1] and "division by zero" in said[2] and "syntax" in said[3]
    assert (row["reward"], row["finish_reason"]) == (1.0, "done")
    stub.set(script=["ANSWER: 85"])
    assert run(one, tmp_path / "wrong", stub.url, *flags) == 0
    assert samples(tmp_path / "wrong")[0]["reward"] == 0.0


def test_seeds_differ_by_sample_and_repeat_by_job(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", "seed": 5}])
    for name in ("one", "two"):
        assert run(source, tmp_path / name, stub.url, "--n", "3", "--seed", "9") == 0
    one, two = [
        [row["sampling"]["seed"] for row in samples(tmp_path / name)] for name in ("one", "two")
    ]
    assert one == two and len(set(one)) == 6 and all(0 <= seed < 2**31 for seed in one)
