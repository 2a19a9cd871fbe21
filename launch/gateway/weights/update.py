"""One weight update at all engines: a trainer's calls, one after another, as to one engine.

pause -> quiesce -> flush -> update -> commit -> continue. The gate is closed from the first call to
the last one; requests at the engines end with what they have, or go on, as the pause's mode says.
Engines that miss one of the calls, or begin anew meanwhile, get no requests until they have been
updated again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypedDict

from common.ids import Incarnation
from common.json import JsonObject
from launch.gateway.errors import BadRequest, Unavailable
from launch.gateway.peers.engine_client import Call, HttpAnswer
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.weights.bodies import tags_of
from launch.gateway.weights.catch_up import FROM_DISK, CatchUp
from launch.gateway.weights.fan_out import AllEngines, merged, open_jobs
from launch.gateway.weights.gate import Gate
from launch.gateway.weights.groups import UpdateGroups
from launch.gateway.weights.names import WeightNames

if TYPE_CHECKING:
    from launch.gateway.services import Services, Walk

FROM_TENSOR = "/update_weights_from_tensor"
FROM_DISTRIBUTED, VERSION = "/update_weights_from_distributed", "/update_weight_version"
SESSION_CALLS = ("/begin_weight_update", "/end_weight_update")
NEED_SESSION = (FROM_TENSOR, FROM_DISTRIBUTED)
"""SGLang takes these between begin and end only, which not every trainer sends."""
PAUSE, SESSION, UPDATE, MEMORY = "pause", "session", "update", "memory"
"""Who holds the gate."""
ABORT, RETRACT, IN_PLACE = "abort", "retract", "in_place"
OK = 200
QUIET_S = 60.0
"""For requests to leave the engines once they were told to."""
LOOK_S = 0.05


class WeightsView(TypedDict):
    """What operators see of them."""

    version: str
    """As the trainer calls those that are served."""
    name: str
    """What the cluster calls them; empty as long as they were not updated."""
    held_by: list[str]
    """Why requests wait: a pause, a session, an update, released memory."""


class WeightUpdate:
    """The present one, if there is one."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._members = services.plane.members
        self.gate = Gate()
        self.names = WeightNames(self._members, services.leadership)
        self.names.is_updating = lambda: not self.gate.is_open
        services.plane.on_engine_heard = self._heard
        self._updated: dict[str, Incarnation] | None = None
        """Processes that have taken every update since the gate closed; None: there was none."""
        self.engines = AllEngines(services.client, self._members)
        self.groups = UpdateGroups(self.engines)
        self.catch_up = CatchUp(self.engines, self._members)
        self._released: set[str] = set()
        """Memory that engines have given back, by SGLang's tags."""

    def _heard(self) -> None:
        """An engine has reported."""
        self.names.heard()
        if self.gate.is_open and self._services.leadership.is_active:
            self.catch_up.heard()

    # ---- the gate ---------------------------------------------------------------------

    async def _open(self, who: str) -> None:
        """``who`` holds the gate no more; the last one gives the weights their name first."""
        if self.gate.holders <= {who}:
            await self._commit()
        self.gate.release(who)
        if self.gate.is_open:
            self._updated = None
            self.names.heard()
            self._services.plane.changed.set()

    async def _commit(self) -> None:
        if self._updated is not None:
            await self.names.settle([e for e in self.engines.live() if self._has_all(e)])
            self._updated = None

    def _has_all(self, engine: EnginePeer) -> bool:
        """Also of an attention group: its process has taken every update."""
        updated = self._updated if self._updated is not None else {}
        return updated.get(engine.address.http) == engine.incarnation

    # ---- pauses -----------------------------------------------------------------------

    async def pause(self, path: str, body: JsonObject) -> HttpAnswer:
        mode = body.get("mode", ABORT)
        if mode not in (ABORT, RETRACT, IN_PLACE):
            raise BadRequest(f"mode is to be abort, retract or in_place, not {mode!r}.", "mode")
        self.gate.hold(PAUSE)
        if mode == ABORT:
            await self._end_walks()
        elif mode == RETRACT:  # what decodes is the engines' to retract
            await self._end_walks(lambda walk: not walk.is_prefilled)
        return await self.engines.at_all(path, body)

    async def resume(self, path: str, body: JsonObject) -> HttpAnswer:
        if self.gate.holders <= {PAUSE}:
            await self._commit()
        answer = await self.engines.at_all(path, body)
        await self._open(PAUSE)
        return answer

    async def _end_walks(self, which: Callable[[Walk], bool] = lambda walk: True) -> bool:
        """Requests at the engines end with what they have; False if some did not. What an engine
        gets after it was told to end it, it is told again."""

        async def told_again() -> bool:
            walks = [w for w in self._services.walks.values() if w.is_at_engines and which(w)]
            await asyncio.gather(*(walk.pause() for walk in walks))
            return not walks

        return await until(told_again, QUIET_S)

    # ---- updates ----------------------------------------------------------------------

    async def begin(self, path: str, body: JsonObject) -> HttpAnswer:
        is_open = SESSION in self.gate.holders
        self.gate.hold(SESSION)
        answer = await self._update(path, body)
        if answer.status != OK and not is_open:
            await self._open(SESSION)
        return answer

    async def end(self, path: str, body: JsonObject) -> HttpAnswer:
        self.gate.hold(SESSION)
        try:
            return await self._update(path, body)
        finally:
            await self._open(SESSION)

    async def update(self, path: str, body: JsonObject) -> HttpAnswer:
        """Any of ``/update_weights_from_*``, or ``/update_weight_version``."""
        if path == FROM_TENSOR:
            await self.engines.check_tensors(body)
        self.gate.hold(UPDATE)
        try:
            if body.get("abort_all_requests", path == VERSION):
                await self._end_walks()
            if path not in NEED_SESSION or SESSION in self.gate.holders:
                return await self._update(path, body)
            opened = await self._update("/begin_weight_update", _selected(body))
            if opened.status != OK:
                return opened
            answer = await self._update(path, body)
            await self._update("/end_weight_update", {})
            return answer
        finally:
            await self._open(UPDATE)

    async def _update(self, path: str, body: JsonObject) -> HttpAnswer:
        """At all that have taken every update so far. Who does not take this one has not; unless
        nobody does: then they are still alike."""
        await self.catch_up.ended()
        engines = self.engines.in_rank_order()
        if self._updated is not None and path not in SESSION_CALLS:
            engines = [e for e in engines if self._has_all(e)]
        if path == FROM_DISTRIBUTED:
            engines = self.groups.joined(engines, body)
        incarnations = {e.name: (e.address.http, e.incarnation) for e in engines}
        outcomes = await self.engines.at_each(engines, Call("POST", path, body))
        if self._updated is not None:
            counted = {e.name for e in engines if self._has_all(e)}
            outcomes = {name: o for name, o in outcomes.items() if name in counted}
        done = dict(incarnations[n] for n, o in outcomes.items() if o.has_new_weights)
        if done:
            self._updated = done
            self.catch_up.updated(path, body)
        if path == FROM_DISK:  # a trainer may delete the folder once it has the answer
            await self.names.digested([e for e in self.engines.live() if self._has_all(e)])
        served = {e.address.role for e in engines if e.address.http in done}
        return merged(outcomes, roles_left=served)

    # ---- memory -----------------------------------------------------------------------

    async def release_memory(self, path: str, body: JsonObject) -> HttpAnswer:
        """SGLang asserts that it is idle; agents must have ended their reads of the pool, too."""
        tags = tags_of(body)
        self.gate.hold(MEMORY)
        if not (await self._end_walks() and await until(self._is_idle, QUIET_S)):
            if not self._released:
                await self._open(MEMORY)
            raise Unavailable("not released: requests or transfers of KV do not end")
        self._released |= set(tags)
        return await self.engines.at_all(path, body)

    async def resume_memory(self, path: str, body: JsonObject) -> HttpAnswer:
        tags = tags_of(body)
        answer = await self.engines.at_all(path, body)
        if answer.status == OK:
            self._released -= set(tags)
        if not self._released:
            await self._open(MEMORY)
        return answer

    async def _is_idle(self) -> bool:
        if any(open_jobs(engine) for engine in self.engines.live()):
            return False
        return not await self._services.client.flush()

    def view(self) -> WeightsView:
        """For operators."""
        served = self._members.served_weights
        namespace = self._members.namespace()
        hellos = [engine.known() for engine in self.engines.live()]
        versions = [h.weights.version for h in hellos if h.namespace == namespace]
        return {
            "version": versions[0] if versions else "",
            "name": served.version if served is not None else "",
            "held_by": sorted(self.gate.holders),
        }


async def until(holds: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
    """Whether it came to hold in time."""
    deadline_s = time.monotonic() + limit_s
    while not await holds():
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(LOOK_S)
    return True


def _selected(body: JsonObject) -> JsonObject:
    return {"selector": body["selector"]} if "selector" in body else {}
