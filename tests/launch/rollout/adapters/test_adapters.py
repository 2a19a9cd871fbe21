"""Environments of others, as harnesses of a job."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import threading
from argparse import Namespace
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from aiohttp import WSMsgType, web

from launch.rollout.adapters import slime
from tests.launch.rollout.jobs import run, samples, write_jsonl
from tests.launch.rollout.stub import END, chat_ids, text_ids

PROGRAM = f"{sys.executable} -m launch.rollout.adapters."


def one(tmp_path: Path, url: str, program: str, row: dict[str, Any], *flags: str) -> dict[str, Any]:
    source = write_jsonl(tmp_path / "in.jsonl", [row])
    given = ("--harness", PROGRAM + program, "--logprobs", *flags)
    assert run(source, tmp_path / "out", url, *given) == 0
    [sample] = samples(tmp_path / "out")
    return sample


def test_a_text_environment_of_gymnasium(stub, tmp_path):
    stub.set(script=["I say 3.", "no idea", "Then 7"])
    row = {"prompt": "Guess.", "env": "examples.guess:Guess-v0", "env_args": {"secret": 7}}
    sample = one(tmp_path, stub.url, "gymnasium_text", row)
    said = [message["content"] for message in sample["messages"]]
    assert said[::2] == ["Guess.", "I say 3.", "no idea", "Then 7"]
    assert said[1:6:2] == [
        "Which number from 1 to 10?",
        "It is more than 3.",
        "Answer with a number from 1 to 10.",
    ]
    assert sample["reward"] == pytest.approx(0.9) and sample["finish_reason"] == "done"
    assert (len(sample["turns"]), sample["trajectory"], sample["exit_code"]) == (3, 0, 0)


def test_an_environment_that_the_job_cuts_off_keeps_its_reward(stub, tmp_path):
    stub.set(script=["1", "2", "3"])
    row = {"prompt": "Guess.", "env": "examples.guess:Guess-v0", "env_args": {"secret": 7}}
    sample = one(tmp_path, stub.url, "gymnasium_text", row, "--max-turns", "2")
    assert sample["finish_reason"] == "max_turns" and sample["reward"] == pytest.approx(-0.2)


async def converse(request: web.Request) -> web.WebSocketResponse:
    """OpenEnv's server, of an environment that ends when it is told "stop"."""
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    heard: list[str] = []
    async for message in socket:
        assert message.type == WSMsgType.TEXT
        asked = message.json()
        if asked["type"] == "reset":
            heard = []
            seen, reward = f"Hello, {asked['data']['name']}.", None
        elif "message" not in asked["data"]:
            await socket.send_json({"type": "error", "data": {"message": "no message"}})
            continue
        else:
            heard.append(asked["data"]["message"])
            seen, reward = f"{len(heard)} heard", 0.25
        done = bool(heard) and heard[-1] == "stop"
        data = {"observation": {"text": seen}, "reward": reward, "done": done}
        await socket.send_json({"type": "observation", "data": data})
    return socket


@contextlib.contextmanager
def openenv_server() -> Iterator[str]:
    loop, url, over = asyncio.new_event_loop(), [""], asyncio.Event()
    begun = threading.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/ws", converse)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url[0] = f"http://127.0.0.1:{runner.addresses[0][1]}"
        begun.set()
        await over.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert begun.wait(10)
    try:
        yield url[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()


def test_an_environment_of_openenv(stub, tmp_path):
    stub.set(script=["go", "stop"])
    with openenv_server() as url:
        row = {"prompt": "Talk.", "env_url": url, "reset": {"name": "you"}, "observation": "text"}
        sample = one(tmp_path, stub.url, "openenv", row)
    said = [message["content"] for message in sample["messages"]]
    assert said == ["Talk.", "Hello, you.", "go", "1 heard", "stop"]
    assert sample["reward"] == 0.5 and len(sample["turns"]) == 2


def test_what_openenv_refuses_fails_the_episode(stub, tmp_path):
    stub.set(script=["go"])
    with openenv_server() as url:
        row = {"prompt": "Talk.", "env_url": url, "reset": {"name": "you"}, "action": "act"}
        source = write_jsonl(tmp_path / "in.jsonl", [row])
        flags = ("--harness", PROGRAM + "openenv")
        assert run(source, tmp_path / "out", stub.url, *flags) == 3
    [sample] = samples(tmp_path / "out")
    assert "no message" in sample["error"] and sample["exit_code"] == 1


@dataclasses.dataclass
class SlimeSample:
    """The fields of slime's ``Sample`` (``slime/utils/types.py``) that are read or set."""

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    prompt: Any = "p"
    label: str | None = None
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokens: list[int] = dataclasses.field(default_factory=list)
    response: str = ""
    response_length: int = 0
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    weight_versions: list[str] = dataclasses.field(default_factory=list)
    reward: float | None = None
    status: Status = Status.PENDING


SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 64, "top_k": -1}


def slime_args(url: str, harness: str) -> Namespace:
    ip, _, port = url.removeprefix("http://").rpartition(":")
    return Namespace(sglang_router_ip=ip, sglang_router_port=int(port), harness=harness)


@pytest.mark.asyncio
async def test_slimes_own_generate_function(stub):
    # The plain agent looks for its conversations in the row; slime's is in the metadata.
    code = (
        "import json, os; from tests.launch.rollout.recording import plain_agent as a; "
        "row = json.load(open(os.environ['ROLLOUT_ROW'])); "
        "[a.chat(**talk) for talk in row['metadata']['talks']]; "
        "print(json.dumps({'reward': float(row['label'])}))"
    )
    harness = f'{sys.executable} -c "{code}"'
    stub.set(script=["Yes.", "Two.", "A fork."])
    talks = [{"asks": ["One?", "Two?"], "fork": "Three?"}]
    sample = SlimeSample(label="2", metadata={"talks": talks})
    made = await slime.generate(slime_args(stub.url, harness), sample, SAMPLING)
    assert isinstance(made, list)
    main, fork = made
    assert main is sample and (main.reward, fork.reward) == (2.0, 2.0)
    assert (main.status, fork.status) == (SlimeSample.Status.COMPLETED,) * 2
    first = chat_ids([{"role": "user", "content": "One?"}])
    assert main.tokens[: len(first)] == first
    assert main.response_length == len(main.tokens) - len(first)
    generated = [*text_ids("Yes."), END]
    assert main.loss_mask[: len(generated)] == [1] * len(generated)
    assert sum(main.loss_mask) == len(generated) + len(text_ids("Two.")) + 1
    assert len(main.loss_mask) == len(main.rollout_log_probs) == main.response_length
    zeros = [p for p, mask in zip(main.rollout_log_probs, main.loss_mask, strict=True) if not mask]
    assert set(zeros) == {0.0}
    assert main.response == "Two." and main.weight_versions == ["v1", "v1"]
    assert sum(fork.loss_mask) == len(text_ids("A fork.")) + 1
    assert fork.tokens[: len(first)] == first


@pytest.mark.asyncio
async def test_a_sample_of_slimes_that_fails(stub):
    args = slime_args(stub.url, f"{sys.executable} -c 1")
    sample = await slime.generate(args, SlimeSample(), SAMPLING)
    assert isinstance(sample, SlimeSample) and sample.status is SlimeSample.Status.FAILED
