"""Three prefill engines, one decode engine and their agents, each node in a namespace.

``all`` holds KV of every layer, for one request; ``window`` the same bytes for W layers,
hence of L/W requests; ``whole`` is ``all`` without anything layer by layer: it has a
request's hits brought before its forward, and its new KV sent after it. A request goes to one
of them because the others are drained. Contexts are in the DRAM of the decode node's agent, so
every delivery to a prefill engine crosses the compute network.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from benchmarks.testbed.cluster import (
    FORGETTING,
    EngineChange,
    Gateway,
    cluster_config,
    records_on,
    total,
)
from benchmarks.testbed.network import Network
from launch.cluster.layout import PAGE_TOKENS
from launch.cluster.process_record import ProcessRecord

LAYERS, WINDOW = 8, 2
TOKEN_BYTES = 8192
"""KV of the model ``tiny``, all layers, float32."""
CONTEXT_TOKENS = 190 * PAGE_TOKENS
NEW_TOKENS = 512
CONTEXTS = 4
STORED_TOKENS_MAX = CONTEXTS * CONTEXT_TOKENS + 160 * NEW_TOKENS
"""Contexts, and what all requests add."""
DECODED = 9
"""Requests that fit into the decode engine."""
ONE_REQUEST_TOKENS = (-(-(CONTEXT_TOKENS + NEW_TOKENS) // PAGE_TOKENS) + 4) * PAGE_TOKENS
"""The smallest pool in which a request fits."""
ENGINES = {"all": "p0", "window": "p1", "whole": "p2"}
DECODE = "d0"
PORT = 31900
OUTPUT_TOKENS = 4


def make_records(network: Network, folder: Path) -> tuple[Any, list[ProcessRecord]]:
    """The cluster's settings and processes."""
    config = cluster_config(len(ENGINES), 1, PORT, folder, "", {})
    config = dataclasses.replace(
        config,
        dram_bytes=STORED_TOKENS_MAX * TOKEN_BYTES,
        path_policy="decode",
        max_total_tokens=DECODED * (ONE_REQUEST_TOKENS + PAGE_TOKENS),
    )
    tokens = {"all": ONE_REQUEST_TOKENS, "window": ONE_REQUEST_TOKENS * LAYERS // WINDOW}
    tokens["whole"] = tokens["all"]
    settings: dict[str, dict[str, Any]] = {
        "all": {},
        "window": {"layer_window": WINDOW},
        "whole": {},
    }
    experiments = {
        "whole": msgspec.structs.replace(FORGETTING, load_by_layer=False, send_by_layer=False)
    }
    changes = {
        name: EngineChange(
            settings[arm],
            experiments.get(arm, FORGETTING),
            # On a CPU a forward ends before the next batch is formed, so there is nothing to
            # overlap; the schedule for it would only keep each batch's pages for a forward more.
            ("--max-total-tokens", str(tokens[arm]), "--disable-overlap-schedule"),
        )
        for arm, name in ENGINES.items()
    }
    changes[DECODE] = EngineChange({"promise_planned_only": True})
    return config, records_on(network, config, changes, dram_keep=True)


class Sample(NamedTuple):
    """One answered request."""

    output: tuple[int, ...]
    cached_tokens: int
    first_s: float


class Counters(NamedTuple):
    """What one prefill engine has counted."""

    forwards: float
    compute_s: float
    """Of the forwards, without what they waited for KV."""
    waited_s: tuple[float, ...]
    """By layer."""
    requests_max: float
    kv_bytes: float

    @property
    def forward_s(self) -> float:
        """Of the forwards, with what they waited."""
        return self.compute_s + sum(self.waited_s)

    def since(self, before: Counters) -> Counters:
        waited = tuple(a - b for a, b in zip(self.waited_s, before.waited_s, strict=True))
        return Counters(
            self.forwards - before.forwards,
            self.compute_s - before.compute_s,
            waited,
            self.requests_max,
            self.kv_bytes,
        )


class Arms:
    """Sends requests to one arm at a time."""

    def __init__(self, gateway: Gateway, on_step: Callable[[], object]) -> None:
        self._gateway = gateway
        self._on_step = on_step
        self._numbers = random.Random(11)
        self._contexts = [self.prompt(CONTEXT_TOKENS) for _ in range(CONTEXTS)]

    def prompt(self, tokens: int) -> list[int]:
        """Never seen before."""
        return self._numbers.choices(range(300, 2000), k=tokens)

    def request(self, context: int) -> list[int]:
        """A context that is stored, and new tokens."""
        return self._contexts[context % CONTEXTS] + self.prompt(NEW_TOKENS)

    async def store_contexts(self) -> None:
        """Compute them once; they are in DRAM afterwards."""
        await self.use("all")
        for context in self._contexts:
            await self.send(context)
        # No tier is durable here: they are in DRAM as soon as no pull is open.
        while total(await self._gateway.metrics(), "dualpath:engine_open_jobs"):
            self._gateway.check_alive()

    async def use(self, arm: str) -> None:
        """All requests go to this arm from now on."""
        await self._gateway.drain(ENGINES[arm], False)
        for other in ENGINES.values():
            if other != ENGINES[arm]:
                await self._gateway.drain(other, True)

    async def send(self, prompt: list[int]) -> Sample:
        """One request; what it took is the gateway's own measure."""
        params = {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True}
        answer, trace = await self._gateway.generate(
            {"input_ids": prompt, "sampling_params": params}
        )
        self._on_step()
        return Sample(
            tuple(answer["output_ids"]),
            answer["meta_info"]["cached_tokens"],
            trace["timings_s"]["first_byte"],
        )

    async def send_all(self, prompts: list[list[int]]) -> tuple[list[Sample], float]:
        """At once; also the seconds until the last answer."""
        began = time.monotonic()
        samples = await asyncio.gather(*map(self.send, prompts))
        return samples, time.monotonic() - began

    async def counters(self, arm: str) -> Counters:
        """Of the arm's engine, up to date."""
        await asyncio.sleep(1.0)  # the gateway asks engines each second
        metrics = await self._gateway.metrics()
        own = {name: v for name, v in metrics.items() if f'engine="{ENGINES[arm]}"' in name}
        waited = [total(own, f'layer="{layer}"') for layer in range(LAYERS)]
        return Counters(
            total(own, "engine_forwards_total"),
            total(own, "engine_forward_seconds_total"),
            tuple(waited),
            total(own, "engine_forward_requests_max"),
            total(own, "engine_kv_bytes"),
        )

    async def free_tokens(self, arm: str) -> int:
        """Of the arm's pool, as last reported."""
        state = await self._gateway.cluster()
        return next(e["free_tokens"] for e in state["engines"] if e["name"] == ENGINES[arm])
