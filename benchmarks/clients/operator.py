"""What an operator asks of a gateway."""

from __future__ import annotations

import time
from typing import Any

import aiohttp
import msgspec

LOOK_TIMEOUT_S = 3.0
OPERATOR_TIMEOUT_S = 30.0


class Operator:
    """What an operator asks of the gateway, or of an engine."""

    def __init__(self, url: str) -> None:
        self._http = aiohttp.ClientSession(url)

    async def close(self) -> None:
        await self._http.close()

    async def state(self) -> dict[str, Any] | None:
        """``/admin/cluster``; None while the gateway does not answer."""
        text = await self._get("/admin/cluster")
        return None if text is None else msgspec.json.decode(text)

    async def metrics(self) -> dict[str, float]:
        """Every sample, by name with labels; empty while the gateway does not answer."""
        text = await self._get("/metrics") or b""
        lines = [line for line in text.decode().splitlines() if line and line[0] != "#"]
        pairs = (line.rpartition(" ") for line in lines)
        return {name: float(value) for name, _, value in pairs}

    async def troubles(self) -> str:
        """What ``/health`` says; "" of a gateway that does not answer."""
        return (await self._get("/health", any_status=True) or b"").decode()

    async def healthy(self) -> bool:
        """Whether an engine of each role serves."""
        return await self._get("/health") is not None

    async def _get(self, path: str, any_status: bool = False) -> bytes | None:
        try:
            timeout = aiohttp.ClientTimeout(total=LOOK_TIMEOUT_S)
            async with self._http.get(path, timeout=timeout) as response:
                said = await response.read()
                return said if any_status or response.status == 200 else None
        except (aiohttp.ClientError, TimeoutError):
            return None

    async def order(self, url: str, body: dict[str, Any]) -> str:
        """An operator's POST to the gateway, or an engine: what came of it."""
        try:
            timeout = aiohttp.ClientTimeout(total=OPERATOR_TIMEOUT_S)
            async with self._http.post(url, json=body, timeout=timeout) as response:
                return f"{response.status} {(await response.text())[:200]}"
        except (aiohttp.ClientError, TimeoutError) as error:
            return f"no answer: {error!r}"

    async def heard(self, since_s: float = 0.0) -> set[str]:
        """Living agents and engines whose last report is younger."""
        now = time.monotonic()
        state = await self.state()
        if state is None:
            return set()
        processes = [*state["agents"], *state["engines"]]
        return {p["name"] for p in processes if p["alive"] and now - p["last_seen_s"] > since_s}
