"""An engine that begins anew, or joins, has the weights of its flags: where those that are served
came from a folder that is still there, it is told to load them, and serves with the others then.

Its weights' name is the digest of what it has read. A folder that was changed since, or deleted as
AReaL does, leaves it out, as if it had not been told: until the next update.
"""

from __future__ import annotations

import asyncio
import logging

from common.ids import Incarnation
from common.json import JsonObject
from launch.gateway.peers.engine_client import Call
from launch.gateway.peers.membership import Membership, WeightsName
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.weights.fan_out import AllEngines

log = logging.getLogger(__name__)

FROM_DISK = "/update_weights_from_disk"


class CatchUp:
    """Tells each process once. In memory: a gateway that begins anew tells none."""

    def __init__(self, engines: AllEngines, members: Membership) -> None:
        self._engines = engines
        self._members = members
        self._body: JsonObject | None = None
        """Of the call by which the present weights came; None if they came in another way."""
        self._told: dict[str, Incarnation] = {}
        self._under_way: set[asyncio.Task[None]] = set()

    def updated(self, path: str, body: JsonObject) -> None:
        """Engines have taken this."""
        self._body = body | {"abort_all_requests": False} if path == FROM_DISK else None

    def heard(self) -> None:
        """An engine has reported, and no update is under way."""
        served = self._members.served_weights
        if self._body is None or served is None:
            return
        for engine in self._engines.in_rank_order():
            is_new = not engine.known().weights.changes
            is_other = WeightsName.of(engine.known().namespace) != served
            if is_new and is_other and self._told.get(engine.name) != engine.incarnation:
                self._told[engine.name] = engine.incarnation
                task = asyncio.create_task(self._tell(engine, self._body))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)

    async def ended(self) -> None:
        """Return when none loads: two updates of an engine must not cross."""
        while self._under_way:
            await asyncio.wait(set(self._under_way))

    async def close(self) -> None:
        for task in self._under_way:
            task.cancel()
        await self.ended()

    async def _tell(self, engine: EnginePeer, body: JsonObject) -> None:
        outcomes = await self._engines.at_each([engine], Call("POST", FROM_DISK, body))
        outcome = outcomes[engine.name]
        log.info(
            "engine catches up engine=%s folder=%s trouble=%s",
            engine.name,
            body.get("model_path"),
            outcome.trouble,
        )
