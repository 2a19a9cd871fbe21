"""OpenEnv's environments: ``--harness 'python -m launch.rollout.adapters.openenv'``.

A row has ``env_url``, where such a server listens, and may have ``reset`` (a dict for its reset),
``action`` (the field of an action that gets what the model says; ``message`` without) and
``observation`` (the field of an observation that the model is shown; without, all of it as JSON).
The reward is the sum of all.

One connection to ``/ws`` is one session: the server's routes ``/reset`` and ``/step`` make an
environment for each call, which knows nothing of the one before (openenv 0.10.0,
``core/env_server/http_server.py``).
"""

from __future__ import annotations

import asyncio
import sys

import aiohttp
import msgspec

from common.json import JsonObject
from launch.rollout.adapters.chat import Chat, Over, finish, row

MESSAGE_BYTES_MAX = 64 << 20
STEP_S = 600.0
"""For one answer of the environment."""


class Step(msgspec.Struct):
    """What an environment answers to a reset or to an action."""

    observation: JsonObject
    reward: float | None = None
    done: bool = False


class _Told(msgspec.Struct):
    type: str
    data: msgspec.Raw


class EnvRefused(Exception):
    """The environment's server said that something is wrong; the text is its own."""


class Session:
    """One episode's environment, on one connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    async def reset(self, given: JsonObject) -> Step:
        return await self._ask({"type": "reset", "data": given})

    async def step(self, action: JsonObject) -> Step:
        return await self._ask({"type": "step", "data": action})

    async def _ask(self, message: JsonObject) -> Step:
        await self._socket.send_str(msgspec.json.encode(message).decode())
        told = msgspec.json.decode(await self._socket.receive_str(timeout=STEP_S), type=_Told)
        if told.type == "error":
            raise EnvRefused(bytes(told.data).decode())
        return msgspec.json.decode(told.data, type=Step)


def main() -> int:
    """Play the row's environment to its end."""
    finish(asyncio.run(play(row())))
    return 0


async def play(fields: JsonObject) -> float:
    """Returns the sum of the rewards; raises :class:`EnvRefused`."""
    url = str(fields["env_url"]).rstrip("/") + "/ws"
    given, total, chat = fields.get("reset"), 0.0, Chat(fields)
    name = str(fields.get("action") or "message")
    async with (
        aiohttp.ClientSession() as http,
        http.ws_connect(url, max_msg_size=MESSAGE_BYTES_MAX) as socket,
    ):
        session = Session(socket)
        step = await session.reset(given if isinstance(given, dict) else {})
        while not step.done:
            try:
                said = await asyncio.to_thread(chat.say, _shown(fields, step))
            except Over:  # what it has so far counts
                break
            step = await session.step({name: said})
            total += step.reward or 0.0
    return total


def _shown(fields: JsonObject, step: Step) -> str:
    name = fields.get("observation")
    seen: object = step.observation if name is None else step.observation.get(str(name))
    return seen if isinstance(seen, str) else msgspec.json.encode(seen).decode()


if __name__ == "__main__":
    sys.exit(main())
