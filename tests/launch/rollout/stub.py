"""A stand-in for the cluster's endpoint, for tests of jobs: its "model" is a hash.

``python -m tests.launch.rollout.stub 0`` prints its port. ``/stub`` (POST) sets faults, (GET)
counts; of requests in flight, the most since it was set.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.typedefs import Handler

from tests.launch.rollout.recording.stub_routes import (
    ROUTES,
    as_generate,
    chat_of,
    events,
    record_of,
    said_in,
    whole_answer,
)

START, END, NEWLINE, FIRST = 1, 2, 3, 100
"""Special tokens; a byte b of text is token FIRST + b."""


def text_ids(text: str) -> list[int]:
    return [FIRST + b for b in text.encode()]


def chat_ids(messages: list[dict[str, Any]], generation: bool = True) -> list[int]:
    ids = []
    for message in messages:
        body = text_ids(f"{message['role']}:{message['content']}")
        ids += [START, *body, END, NEWLINE]
    return [*ids, START, *text_ids("assistant:")] if generation else ids


def route_ids(path: str, body: dict[str, Any]) -> list[int]:
    return chat_ids(chat_of(path, body))


def decode(ids: list[int]) -> str:
    return bytes(i - FIRST for i in ids if i >= FIRST).decode(errors="replace")


def answer_ids(prompt: list[int], max_new_tokens: int) -> tuple[list[int], str]:
    """What the model says: letters that depend on every token, and sometimes an end."""
    seed = hashlib.blake2b(json.dumps(prompt).encode(), digest_size=16).digest()
    ids = [FIRST + 97 + b % 26 for b in seed][: max_new_tokens - 1]
    return (ids + [END], "stop") if seed[0] % 2 else (ids + [FIRST + 33], "length")


def logprob(prompt: list[int], position: int) -> float:
    """Of the token at ``position`` of prompt and answer."""
    return -((sum(prompt[:8]) + position) % 97) / 97


class Stub:
    """Settable: ``delay_s``; ``fail`` and ``full`` answer so many with 500 and 429; ``script``
    replaces the answers' text, in turn; ``refuse_tokens`` answers 400 from that length on; a
    ``standby`` answers nothing; ``cut`` answers so many with ``abort`` after ``cut_tokens`` tokens,
    whose text and number are otherwise as they would have been, and commits ``versions`` in turn
    after each; requests whose name (``row.sample.turn.number``) begins as one in ``slow`` are
    answered when they are aborted, or when that list is another."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {"weight_version": "v1", "admitted_max": 8}
        self.counts: Counter[str] = Counter()
        self.in_flight = self.in_flight_max = 0
        self.prompts: Counter[tuple[int, ...]] = Counter()
        self.begun: dict[tuple[int, ...], list[int]] = {}
        """By tokens that are left, prompt and what was generated: what comes then of an answer that
        was aborted."""
        self.live: dict[str, asyncio.Event] = {}
        """By id, requests in flight: set when they are aborted."""
        self.changed = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26, middlewares=[self.door])
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/admin/cluster", self.cluster)
        app.router.add_post("/v1/tokenize", self.tokenize)
        app.router.add_post("/v1/detokenize", self.detokenize)
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/abort_request", self.abort)
        for path in ROUTES:
            app.router.add_post(path, self.converse)
        app.router.add_post("/v1/messages/count_tokens", self.count)
        app.router.add_post("/stub", self.change)
        app.router.add_get("/stub", self.show)
        return app

    @web.middleware
    async def door(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self.settings.get("standby") and request.path != "/stub":
            self.counts["refused"] += 1
            return web.json_response({"error": "not the active one"}, status=503)
        return await handler(request)

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.settings["weight_version"]})

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": self.settings.get("model", "stub")}]})

    async def cluster(self, _: web.Request) -> web.Response:
        return web.json_response({"requests": {"admitted_max": self.settings["admitted_max"]}})

    async def tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body:
            ids = chat_ids(body["messages"], body.get("add_generation_prompt", True))
        else:
            ids = text_ids(body["prompt"])
        return web.json_response({"tokens": ids})

    async def detokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"text": decode((await request.json())["tokens"])})

    async def change(self, request: web.Request) -> web.Response:
        self.settings |= await request.json()
        self.in_flight_max = self.in_flight
        self.changed.set()
        self.changed = asyncio.Event()
        return web.json_response({})

    async def show(self, _: web.Request) -> web.Response:
        counts = {"requests": 0, **self.counts} | {"in_flight_max": self.in_flight_max}
        return web.json_response(counts)

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.counts["requests"] += 1
        for fault, status in (("full", 429), ("fail", 500)):
            if self.settings.get(fault, 0) > 0:
                self.settings[fault] -= 1
                self.counts[fault] += 1
                return web.json_response({"error": fault}, status=status)
        ids = body["input_ids"]
        if len(ids) >= self.settings.get("refuse_tokens", 1 << 30):
            return web.json_response({"error": "too long"}, status=400)
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight, self.in_flight_max)
        aborted = self.live[body["rid"]] = asyncio.Event()
        try:
            await asyncio.sleep(self.settings.get("delay_s", 0.0))
            await self.held(body["rid"].split("-")[1], aborted)
        finally:
            self.in_flight -= 1
            del self.live[body["rid"]]
        return web.json_response(self.answer(body, ids, aborted.is_set()))

    async def held(self, name: str, aborted: asyncio.Event) -> None:
        """Until it was aborted, or is not slow any more."""
        while name.startswith(tuple(self.settings.get("slow", []))) and not aborted.is_set():
            waits = [asyncio.ensure_future(e.wait()) for e in (aborted, self.changed)]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()

    async def abort(self, request: web.Request) -> web.Response:
        self.counts["aborted"] += 1
        if (aborted := self.live.get((await request.json())["rid"])) is not None:
            aborted.set()
        return web.Response()

    async def count(self, request: web.Request) -> web.Response:
        ids = route_ids("/v1/messages", await request.json())
        return web.json_response({"input_tokens": len(ids)})

    async def converse(self, request: web.Request) -> web.StreamResponse:
        """One of the three routes: the prompt's ids where these are asked for, else an answer."""
        body = await request.json()
        if "x-dualpath-prompt-ids" in request.headers:
            return web.json_response({"tokens": route_ids(request.path, body)})
        self.counts["requests"] += 1
        if self.settings.get("lose", 0) > 0:
            self.settings["lose"] -= 1
            return web.json_response({"error": {"message": "lost"}}, status=502)
        ids = body.get("input_ids") or route_ids(request.path, body)
        answer = self.answer(as_generate(body), ids, False)
        record = record_of(answer) if body.get("return_turn_record") else None
        said = said_in(answer["text"])
        await asyncio.sleep(self.settings.get("delay_s", 0.0))
        if not body.get("stream"):
            whole = whole_answer(request.path, said)
            return web.json_response(whole | ({"turn_record": record} if record else {}))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for event in events(request.path, said, record):
            await response.write(event)
        return response

    def answer(self, body: dict[str, Any], ids: list[int], is_aborted: bool) -> dict[str, Any]:
        params = body["sampling_params"]
        version = self.settings["weight_version"]
        limit = params["max_new_tokens"]
        if (rest := self.begun.get((limit, *ids))) is not None:
            output, finish = rest, "stop" if rest[-1] == END else "length"
            self.counts["continued"] += 1
        else:
            output, finish = answer_ids(ids, limit)
        script = self.settings.get("script")
        if script and limit > 1:
            output, finish = [*text_ids(script.pop(0)), END], "stop"
        is_cut = self.settings.get("cut", 0) > 0 and limit > 1
        if is_cut or is_aborted:
            tokens = self.settings.get("cut_tokens", 2)
            self.begun[(limit - tokens, *ids, *output[:tokens])] = output[tokens:]
            output, finish = output[:tokens], "abort"
        meta: dict[str, Any] = {
            "finish_reason": {"type": finish},
            "prompt_tokens": len(ids),
            "completion_tokens": len(output),
            "cached_tokens": len(ids) // 64 * 64 if self.prompts[tuple(ids)] else 0,
            "weight_version": version,
            "weight_versions": [{"version": version, "start": 0, "end": len(output)}],
        }
        if is_cut:
            self.settings["cut"] -= 1
            if versions := self.settings.get("versions"):
                self.settings["weight_version"] = versions.pop(0)
        self.prompts[tuple(ids)] += 1
        if body.get("return_logprob"):
            places = range(len(ids), len(ids) + len(output))
            pairs = zip(places, output, strict=True)
            meta["output_token_logprobs"] = [[logprob(ids, p), t, None] for p, t in pairs]
        return {"text": decode(output), "output_ids": output, "meta_info": meta}


class StubProcess:
    """The stub in a process of its own."""

    def __init__(self, url: str) -> None:
        self.url = url

    def set(self, **settings: Any) -> None:
        data = json.dumps(settings).encode()
        request = urllib.request.Request(f"{self.url}/stub", data)
        urllib.request.urlopen(request, timeout=5).close()

    def counts(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.url}/stub", timeout=5) as answer:
            return json.load(answer)


@contextlib.contextmanager
def stub_process(port: int = 0, **settings: Any) -> Iterator[StubProcess]:
    argv = [sys.executable, "-m", "tests.launch.rollout.stub", str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        stub = StubProcess(f"http://127.0.0.1:{int(process.stdout.readline())}")
        stub.set(**settings)
        yield stub
    finally:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="session")
def stub_server() -> Iterator[StubProcess]:
    with stub_process() as running:
        yield running


@pytest.fixture
def stub(stub_server: StubProcess) -> StubProcess:
    """The shared stand-in, without the last test's faults."""
    stub_server.set(delay_s=0.0, fail=0, full=0, script=[], weight_version="v1", model="stub")
    stub_server.set(
        refuse_tokens=1 << 30, admitted_max=8, cut=0, cut_tokens=2, versions=[], slow=[]
    )
    return stub_server


async def _serve(port: int) -> None:
    runner = web.AppRunner(Stub().app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
