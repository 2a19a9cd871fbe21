"""The replay against a stub endpoint that has a perfect cache, a forgetful one, or fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from benchmarks import own_cluster as own_cluster_module
from benchmarks.own_cluster import ClusterFailed, free_port, own_cluster
from benchmarks.replay import __main__ as replay_module
from benchmarks.trace import PAGE_TOKENS, SeenBlocks


class StubEndpoint:
    """``/generate`` of a cluster: streams cumulative ids, and reports pages it has seen."""

    def __init__(self) -> None:
        self.seen = SeenBlocks()
        self.bodies: list[dict] = []
        self.active = self.most_active = 0
        self.status = 200
        self.forgets = False
        self.truncates = False

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.status != 200:
            return web.json_response({"error": {"message": "full"}}, status=self.status)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        prompt, wanted = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        hit = 0 if self.forgets else self.seen.hit_blocks(prompt)
        reader = {"blocks": hit, "read_bytes": {"remote": hit * 1000}}
        trace = {"prefill": "p0", "decode": "d0", "hit_blocks": hit, "readers": {"agent-0": reader}}
        response = web.StreamResponse(headers={"x-dualpath-trace": json.dumps(trace)})
        await response.prepare(request)
        generated = [7] * wanted
        for count in sorted({1, wanted}):
            done = count == wanted and not self.truncates
            event = {
                "output_ids": generated[:count],
                "meta_info": {
                    "cached_tokens": hit * PAGE_TOKENS,
                    "finish_reason": {"type": "length"} if done else None,
                },
            }
            await response.write(f"data: {json.dumps(event)}\n\n".encode())
            await asyncio.sleep(0.002)
        self.seen.completed(prompt, generated)
        self.active -= 1
        await response.write(b"data: [DONE]\n\n")
        return response


@contextlib.contextmanager
def serving(stub: StubEndpoint) -> Iterator[str]:
    loop, started = asyncio.new_event_loop(), threading.Event()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))

        async def start() -> web.AppRunner:
            app = web.Application(client_max_size=2**26)
            app.router.add_post("/generate", stub.generate)
            runner = web.AppRunner(app)
            await runner.setup()
            await web.SockSite(runner, listener).start()
            started.set()
            return runner

        def serve() -> None:
            runner = loop.run_until_complete(start())
            loop.run_forever()
            loop.run_until_complete(runner.cleanup())
            loop.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        assert started.wait(10)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def run(stub: StubEndpoint, out: Path, *flags: str) -> tuple[int, dict]:
    with serving(stub) as url:
        status = replay_module.main(
            ["--sessions", "6", "--endpoint", url, "--json", str(out), *flags]
        )
    return status, json.loads(out.read_text())


def goal(report: dict, name: str) -> dict:
    return next(g for g in report["goals"] if g["name"] == name)


def test_a_perfect_cache_meets_the_goal(tmp_path, capsys):
    stub = StubEndpoint()
    status, report = run(stub, tmp_path / "out.json", "--policies", "split")
    assert status == 0
    assert goal(report, "hit rate against the trace, split") == {
        "name": "hit rate against the trace, split",
        "value": 0.0,
        "unit": "points",
        "goal": "<= 2",
        "holds": True,
    }
    result = report["policies"]["split"]
    assert result["requests"] == len(stub.bodies) and result["failed"] == 0
    assert result["blocks_cached"] == result["blocks_implied"] > 0
    reader = result["readers"]["agent-0"]
    assert reader["read_bytes"] == {"remote": 1000 * reader["blocks"]}
    assert 0 < result["ttft_p50_s"] <= result["ttft_p95_s"]
    assert "agent-0" in capsys.readouterr().out


def test_policies_that_were_not_measured_do_not_hold(tmp_path):
    _, report = run(StubEndpoint(), tmp_path / "out.json", "--policies", "split")
    for policy in set(replay_module.POLICY_NAMES) - {"split"}:
        row = goal(report, f"hit rate against the trace, {policy}")
        assert row["value"] is None and row["holds"] is False


def test_a_forgetful_cache_misses_the_goal(tmp_path):
    stub = StubEndpoint()
    stub.forgets = True
    status, report = run(stub, tmp_path / "out.json")
    assert status == 0, "measured, though not met"
    row = goal(report, "hit rate against the trace, endpoint")
    assert row["value"] > 10 and row["holds"] is False


@pytest.mark.parametrize("fault", [{"status": 503}, {"truncates": True}])
def test_failed_requests_are_counted_and_shown(tmp_path, fault, capsys):
    stub = StubEndpoint()
    vars(stub).update(fault)
    _, report = run(stub, tmp_path / "out.json")
    result = report["policies"]["endpoint"]
    assert result["failed"] == result["requests"] == sum(result["errors"].values())
    assert goal(report, "failed requests, endpoint")["holds"] is False
    assert result["ttft_p50_s"] is None
    assert "ReplayError" in capsys.readouterr().err


def test_requests_are_greedy_bounded_and_in_turn(tmp_path):
    stub = StubEndpoint()
    run(stub, tmp_path / "out.json", "--concurrency", "2")
    assert stub.most_active <= 2
    for body in stub.bodies:
        assert body["stream"] is True
        assert body["sampling_params"]["temperature"] == 0
        assert body["sampling_params"]["ignore_eos"] is True
        assert body["sampling_params"]["max_new_tokens"] >= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--policies", "fastest"],
            "choose from prefill, decode, round-robin",
        ),
        (["--sessions", "0"], "not a positive number"),
        (["--scale", "1/0"], "not a fraction"),
        (["--endpoint", "http://x", "--", "--prefill", "2"], "leave out --endpoint"),
        (["--endpoint", "http://x", "--policies", "split,decode"], "one policy"),
    ],
)
def test_bad_flags_say_what_to_do(flags, said, capsys):
    with pytest.raises(SystemExit) as exit_:
        replay_module.parse_arguments(flags)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_flags_after_two_dashes_go_to_the_cluster():
    arguments = replay_module.parse_arguments(["--sessions", "3", "--", "--prefill", "2"])
    assert arguments.cluster_flags == ["--prefill", "2"]
    assert arguments.sessions == 3


def test_a_bad_trace_ends_with_its_line(tmp_path, capsys):
    trace = tmp_path / "bad.jsonl"
    trace.write_text('{"timestamp": 0}\n')
    assert replay_module.main([str(trace)]) == 2
    assert "bad.jsonl:1" in capsys.readouterr().err.replace("\n", "")


def test_a_cluster_that_does_not_start_is_reported(tmp_path, monkeypatch, capsys):
    command = [sys.executable, "-c", "print('no model here'); raise SystemExit(3)"]
    monkeypatch.setattr(own_cluster_module, "launcher", lambda *_: command)
    out = tmp_path / "out.json"
    assert replay_module.main(["--policies", "split", "--json", str(out)]) == 1
    report = json.loads(out.read_text())
    assert not any(row["holds"] for row in report["goals"])
    said = capsys.readouterr().err
    assert "exited with 3" in said and "no model here" in said


def test_own_cluster_ends_with_its_block(tmp_path, monkeypatch):
    (tmp_path / "health").write_text("ok")
    monkeypatch.setattr(
        own_cluster_module,
        "launcher",
        lambda policy, port, store: [
            *(sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"),
            *("--directory", str(tmp_path)),
        ],
    )
    with own_cluster("split", [], start_timeout_s=20) as url:
        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_own_cluster_gives_up_on_one_that_never_gets_healthy(monkeypatch):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(own_cluster_module, "launcher", lambda *_: command)
    with (
        pytest.raises(ClusterFailed, match="not healthy after 0.2 s"),
        own_cluster("split", [], start_timeout_s=0.2),
    ):
        pass


def test_the_launcher_gets_stores_of_its_own(tmp_path):
    command = own_cluster_module.launcher("decode", free_port(), tmp_path)
    assert command[command.index("--path-policy") + 1] == "decode"
    assert command[command.index("--remote") + 1] == f"file://{tmp_path}/remote"
    assert command[command.index("--ssd-dir") + 1].startswith(str(tmp_path))
