"""What a request, a streamed token and a node cost the gateway's process.

The gateway is a process of its own, with sockets to all; clients are here, engines and agents in a
third process (:mod:`benchmarks.scale.fleet`). Its CPU time is read from the kernel's clock of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import numpy as np

from benchmarks.scale.demand import CONTEXT_TOKENS
from benchmarks.scale.fleet import HOST, Fleet
from common.cluster.membership import EngineAddress
from common.process_settings import SECRETS
from launch.gateway.config import GatewayConfig

PROMPT_TOKENS = 64 * 1024
NODES = (4, 8)
"""Prefill and decode nodes."""
START_S = 120.0
STREAMS = 16
STREAM_TOKENS = 128
IDLE_S = 3.0


class GatewayCosts(msgspec.Struct, frozen=True):
    """CPU seconds of the gateway's process, medians of rounds."""

    request_s: float
    """A request of 64K token ids of which nearly all are a hit; one token is streamed."""
    turn_s: float
    """The same of the workload's mean context."""
    token_s: float
    """Each further token of 16 streams at once, which come one by one."""
    node_s: float
    """A node (its engine and its agent) each second, while nothing is asked."""


def measure(rounds: int, requests: int) -> GatewayCosts:
    """``requests``: of each kind in a round."""
    return asyncio.run(_measure(rounds, requests))


async def _measure(rounds: int, requests: int) -> GatewayCosts:
    prompt = np.random.default_rng(0).integers(0, 1 << 17, PROMPT_TOKENS).tolist()
    bodies = [_body(prompt[:tokens], 1) for tokens in (PROMPT_TOKENS, CONTEXT_TOKENS)]
    seen: list[list[float]] = [[], [], [], []]
    async with _running(prompt) as (url, pid), aiohttp.ClientSession(url) as client:
        for body in bodies:
            await _ask(client, body)
        for _ in range(rounds):
            begun_s, began_at = _cpu_s(pid), time.monotonic()
            await asyncio.sleep(IDLE_S)
            idle = (_cpu_s(pid) - begun_s) / (time.monotonic() - began_at)
            seen[3].append(idle / sum(NODES))
            for kind, body in enumerate(bodies):
                begun_s, began_at = _cpu_s(pid), time.monotonic()
                for _ in range(requests):
                    await _ask(client, body)
                spent_s = _cpu_s(pid) - begun_s - idle * (time.monotonic() - began_at)
                seen[kind].append(spent_s / requests)
            seen[2].append(await _relay_s(client, pid, idle))
    request_s, turn_s, token_s, node_s = (float(np.median(each)) for each in seen)
    return GatewayCosts(request_s, turn_s, token_s, node_s)


async def _relay_s(client: aiohttp.ClientSession, pid: int, idle: float) -> float:
    """Of a token: streams of many tokens over as many of one."""
    spent = []
    for tokens in (1, 1 + STREAM_TOKENS):
        body = _body([1, 2, 3], tokens)
        begun_s, began_at = _cpu_s(pid), time.monotonic()
        await asyncio.gather(*(_ask(client, body, tokens) for _ in range(STREAMS)))
        spent.append(_cpu_s(pid) - begun_s - idle * (time.monotonic() - began_at))
    return (spent[1] - spent[0]) / (STREAMS * STREAM_TOKENS)


def _body(prompt: list[int], new_tokens: int) -> bytes:
    sampling = {"max_new_tokens": new_tokens}
    value = {"input_ids": prompt, "sampling_params": sampling, "stream": True}
    return msgspec.json.encode(value)


async def _ask(client: aiohttp.ClientSession, body: bytes, tokens: int = 1) -> None:
    """Raises if not all of the tokens came."""
    headers, received = {"content-type": "application/json"}, b""
    async with client.post("/generate", data=body, headers=headers) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_any():
            received += chunk
    if received.count(b"\n\n") != tokens + 1:  # and the word that it is done
        raise RuntimeError(f"no answer of {tokens} tokens: {received[-500:]!r}")


def _cpu_s(pid: int) -> float:
    """Of all threads of a process so far; Linux numbers the clocks of others so."""
    return time.clock_gettime(~pid << 3 | 2)


# ---- the processes -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _running(prompt: list[int]) -> AsyncIterator[tuple[str, int]]:
    """URL and number of a gateway that knows the whole fleet."""
    with tempfile.TemporaryDirectory(prefix="scale-") as folder, contextlib.ExitStack() as ending:
        fleet = Fleet(folder, secrets.token_hex(32), *NODES, prompt)
        stubs = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scale.fleet"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        ending.callback(_end, stubs)
        assert stubs.stdin is not None and stubs.stdout is not None
        stubs.stdin.write(msgspec.json.encode(fleet) + b"\n")
        stubs.stdin.flush()
        line = await asyncio.to_thread(stubs.stdout.readline)
        config = _config(fleet, msgspec.json.decode(line, type=list[str]))
        hidden = Path(folder) / "secrets"
        hidden.touch(mode=0o600)
        hidden.write_bytes(config.secrets())
        gateway = subprocess.Popen(
            [sys.executable, "-m", "launch.gateway"],
            env={**os.environ, **config.to_env(), SECRETS: str(hidden)},
            stderr=subprocess.DEVNULL,
        )
        ending.callback(_end, gateway)
        url = f"http://{HOST}:{config.port}"
        await _wait_ready(url, gateway)
        yield url, gateway.pid


def _config(fleet: Fleet, urls: list[str]) -> GatewayConfig:
    agents = {f"agent-{name}": fleet.endpoint(f"agent-{name}") for name in fleet.engines}
    engines = [
        EngineAddress(
            name=name,
            role="prefill" if name.startswith("p") else "decode",
            agent=f"agent-{name}",
            http=url,
            control=fleet.endpoint(name),
            bootstrap_host=HOST,
        )
        for name, url in zip(fleet.engines, urls, strict=True)
    ]
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return GatewayConfig(
        host=HOST,
        port=port,
        agents=agents,
        engines=engines,
        control_secret=fleet.secret,
        path_policy="n-way",
    )


async def _wait_ready(url: str, gateway: subprocess.Popen[bytes]) -> None:
    async with asyncio.timeout(START_S), aiohttp.ClientSession(url) as client:
        while True:
            if gateway.poll() is not None:
                raise RuntimeError(f"the gateway ended with {gateway.returncode}")
            with contextlib.suppress(aiohttp.ClientError):
                async with client.get("/health") as response:
                    if response.status == 200:
                        return
            await asyncio.sleep(0.2)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    process.wait()
