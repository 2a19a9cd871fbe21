"""Groups in which a trainer sends weights to the ranks of all engines at once."""

from __future__ import annotations

from collections.abc import Sequence

from common.ids import Incarnation
from common.json import JsonObject
from launch.gateway.errors import BadRequest
from launch.gateway.peers.engine_client import Call, HttpAnswer
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.weights.fan_out import AllEngines, merged

DEFAULT = "weight_update_group"
"""SGLang's, of a body that names none."""


class UpdateGroups:
    """Who is in them: an engine that begins anew has left all of its groups."""

    def __init__(self, engines: AllEngines) -> None:
        self._engines = engines
        self._members: dict[str, dict[str, Incarnation]] = {}
        """By the trainer's name for the group."""

    async def init(self, path: str, body: JsonObject) -> HttpAnswer:
        """The trainer takes the cluster for one engine of as many ranks as all engines have."""
        offset, world_size = body.get("rank_offset"), body.get("world_size")
        if not isinstance(offset, int) or not isinstance(world_size, int):
            raise BadRequest("rank_offset and world_size are to be whole numbers.", "rank_offset")
        engines = self._engines.in_rank_order()
        ranks = await self._engines.ranks(engines)
        needed = offset + sum(ranks.values())
        if world_size < needed:
            each = ", ".join(f"{name} has {count}" for name, count in ranks.items())
            raise BadRequest(
                f"world_size {world_size} is too small for all engines' ranks ({each}): from "
                f"rank_offset {offset} on it is to be {needed} at least.",
                "world_size",
            )
        calls: dict[str, Call] = {}
        for name, count in ranks.items():
            calls[name] = Call("POST", path, body | {"rank_offset": offset})
            offset += count
        outcomes = await self._engines.with_calls(engines, calls)
        if all(outcome.is_done for outcome in outcomes.values()):
            self._members[_name(body)] = {e.name: e.incarnation for e in engines}
        return merged(outcomes)

    async def destroy(self, path: str, body: JsonObject) -> HttpAnswer:
        engines = self.joined(self._engines.in_rank_order(), body)
        self._members.pop(_name(body), None)
        return merged(await self._engines.at_each(engines, Call("POST", path, body)))

    def joined(self, engines: Sequence[EnginePeer], body: JsonObject) -> list[EnginePeer]:
        """Those in the group that a body names; of one that is not known, all: SGLang says so."""
        members = self._members.get(_name(body))
        if members is None:
            return list(engines)
        return [e for e in engines if members.get(e.name) == e.incarnation]


def _name(body: JsonObject) -> str:
    return str(body.get("group_name", DEFAULT))
