"""A client of the stub cluster's gateway, and the requests that its tests send."""

from __future__ import annotations

import json
from typing import Any

from common.block import BlockKey, block_keys
from common.page_hashes import page_hashes
from tests.launch.gateway.agent_stub import NAMESPACE, PAGE_TOKENS
from tests.launch.gateway.stubs import WORDS, StubCluster

TEXT = "".join(WORDS)
PROMPT = "0123456789abc"  # 13 tokens of 4 a page: 3 full pages
GENERATE = {"text": PROMPT, "sampling_params": {"max_new_tokens": 3}}
CHAT = {"model": "stub", "messages": [{"role": "user", "content": PROMPT}]}


def keys_of(text: str, cache_salt: str | None = None) -> list[BlockKey]:
    hashes = page_hashes([ord(c) for c in text], PAGE_TOKENS, cache_salt=cache_salt)
    return block_keys(NAMESPACE.digest(), hashes)


async def post(cluster: StubCluster, path: str, body: Any) -> tuple[int, Any, Any]:
    async with cluster.http.post(path, json=body) as answer:
        text = await answer.text()
        trace = answer.headers.get("x-dualpath-trace")
        value = json.loads(text) if answer.content_type == "application/json" else text
        return answer.status, value, json.loads(trace) if trace else None


def stream_of(text: str) -> list[Any]:
    events = [event[len("data: ") :] for event in text.split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in events]


def content_of(events: list[Any], index: int = 0) -> str:
    choices = [c for e in events if isinstance(e, dict) for c in e.get("choices", [])]
    return "".join(c["delta"].get("content") or "" for c in choices if c["index"] == index)


async def metric(cluster: StubCluster, sample: str) -> float:
    async with cluster.http.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    return next((float(li.rpartition(" ")[2]) for li in lines if li.startswith(sample + " ")), 0.0)
