"""One name for the weights of all engines: which one requests are served with, and who gives it.

An engine's weights have a name if they come from a digested folder, or since the gateway has said
so (:class:`CommitWeights`): it does at the end of an update that went through it, and where a
trainer has updated the engines themselves, once all of them were updated alike. A name of the
gateway's begins with a random number: no other job's weights ever have it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence

from common.messages.fields import Ping
from common.messages.from_engines import WeightsState
from common.messages.from_gateway import CommitWeights, ForgetWeights
from launch.gateway.peers.membership import Membership, WeightsName
from launch.gateway.peers.peer import EnginePeer
from launch.gateway.standby.leadership import Leadership

log = logging.getLogger(__name__)

HEAR_AGAIN_S = 0.02
SETTLE_S = 10.0
"""For engines to say what they are, and to take a name."""
DIGEST_S = 600.0
"""For the digest of a folder that they have loaded."""
VERSION_CHARS = 64
"""Of the trainer's version, in a name."""
_MADE_UP = re.compile(r"[0-9a-f]{32}/.*", re.DOTALL)
"""Names of this gateway's, or of one before it."""


class WeightNames:
    """Gives names, and says to :class:`Membership` which one is served."""

    def __init__(self, members: Membership, leadership: Leadership) -> None:
        self._members = members
        self._leadership = leadership
        self.is_updating: Callable[[], bool] = lambda: False
        """While an update goes through this gateway nothing is named before its end."""
        self._given: dict[str, tuple[int, CommitWeights]] = {}
        """By engine, the name that it was last given, and to which incarnation: it may not have
        come there."""

    # ---- engines that a trainer updates itself ----------------------------------------

    def heard(self) -> None:
        """An engine has reported."""
        if self.is_updating():
            return
        live = self._members.live_engines()
        if self._leadership.is_active:
            self._send_again(live)
            if waiting := self._updated_alike(live):
                self._commit(waiting, self._new_name(waiting))
        if self._members.served_weights is None or self._members.namespace() is None:
            found = _most_updated(live)
            if found is not None and found != self._members.served_weights:
                log.info("weights served name=%s", found.version)
                self._serve(found)

    def _updated_alike(self, live: Sequence[EnginePeer]) -> list[EnginePeer]:
        """Engines that wait for a name, if they are all and have the same weights."""
        states = {e.name: e.known().weights for e in live}
        waiting = [e for e in live if _wants_name(states[e.name], self._is_served(e))]
        if all(states[e.name].is_named for e in waiting) or not _both_roles(waiting):
            return []
        if any(s.in_session or s.is_digesting or s.is_broken for s in _states(waiting)):
            return []
        if any(self._is_served(e) for e in live if e not in waiting):
            return []  # these were not updated yet
        is_unchanged = all(s.changes == s.named_at_change for s in _states(waiting))
        if is_unchanged:  # flushed, some of them, of what had come of older weights
            alike = {s.last_name for s in _states(waiting)}
        elif any(s.is_named for s in _states(waiting)):
            return []
        else:
            alike = {f"{s.changes - s.named_at_change} {s.version}" for s in _states(waiting)}
        return waiting if len(alike) == 1 else []

    def _is_served(self, engine: EnginePeer) -> bool:
        served = self._members.served_weights
        is_named = engine.known().weights.is_named
        return is_named and (served is None or WeightsName.of(engine.known().namespace) == served)

    # ---- an update through this gateway -----------------------------------------------

    async def digested(self, engines: Sequence[EnginePeer]) -> None:
        """Return when these engines know the digest of the folder that they have loaded."""
        await self._all(engines, lambda e: not e.known().weights.is_digesting, DIGEST_S)

    async def settle(self, updated: Sequence[EnginePeer]) -> None:
        """Have these engines, which took the same updates, serve under one name."""
        await self.digested(updated)
        engines = [e for e in updated if not e.known().weights.is_broken]
        if not _both_roles(engines):
            log.warning("weights without a name engines=%s", [e.name for e in updated])
            return
        names = {WeightsName.of(e.known().namespace) for e in engines}
        if len(names) == 1 and all(s.is_named and not s.is_doubtful for s in _states(engines)):
            self._serve(names.pop())
        else:
            await self._settle_as(engines, self._new_name(engines))
        log.info(
            "weights served name=%s engines=%s",
            self._members.served_weights,
            [e.name for e in engines],
        )

    async def _settle_as(self, engines: Sequence[EnginePeer], name: str) -> None:
        self._commit(engines, name)

        def is_named(engine: EnginePeer) -> bool:
            self._send_again([engine])
            return engine.known().namespace.weight_version == name

        await self._all(engines, is_named, SETTLE_S)
        for engine in engines:
            namespace = engine.known().namespace
            if namespace.weight_version == name:
                self._serve(WeightsName.of(namespace))

    async def _all(
        self, engines: Sequence[EnginePeer], holds: Callable[[EnginePeer], bool], limit_s: float
    ) -> None:
        """Return when something holds of what each engine has said from now on, or in time."""
        before = {e.name: e.hello for e in engines}
        deadline_s = time.monotonic() + limit_s
        while time.monotonic() < deadline_s:
            for engine in engines:
                engine.try_send(Ping(self._leadership.term))
            await asyncio.sleep(HEAR_AGAIN_S)
            living = [e for e in engines if self._members.alive(e)]
            if all([e.hello is not before[e.name] and holds(e) for e in living]):
                return
        log.warning("engines are late engines=%s", [e.name for e in engines])

    # ---- both -------------------------------------------------------------------------

    def _serve(self, name: WeightsName) -> None:
        """From now on. KV under a name that was made up for the weights before is never asked for
        again, and makes way for what will be; a folder's may come back."""
        before = self._members.served_weights
        self._members.served_weights = name
        if before in (None, name) or not self._leadership.is_active:
            return
        if before is not None and _MADE_UP.fullmatch(before.version):
            agents = [a for a in self._members.agents.values() if self._members.alive(a)]
            for number, agent in enumerate(agents):
                order = ForgetWeights(before.version, number == 0, self._leadership.term)
                agent.try_send(order)

    def _new_name(self, engines: Sequence[EnginePeer]) -> str:
        version = engines[0].known().weights.version[:VERSION_CHARS]
        return f"{uuid.uuid4().hex}/{version}"  # see _MADE_UP

    def _commit(self, engines: Sequence[EnginePeer], name: str) -> None:
        """Give engines a name, each as it was last heard."""
        is_doubtful = any(s.is_doubtful for s in _states(engines))
        for engine in engines:
            number = engine.known().weights.number
            order = CommitWeights(number, name, is_doubtful, self._leadership.term)
            self._given[engine.name] = engine.incarnation, order
            engine.try_send(order)

    def _send_again(self, engines: Sequence[EnginePeer]) -> None:
        """To those that are still as they were when they were given a name."""
        for engine in engines:
            incarnation, order = self._given.get(engine.name, (None, None))
            if order is not None and incarnation == engine.incarnation:
                if engine.known().weights.number == order.number:
                    engine.try_send(order)


def _wants_name(state: WeightsState, is_served: bool) -> bool:
    return not state.is_named or (state.is_doubtful and is_served)


def _states(engines: Sequence[EnginePeer]) -> list[WeightsState]:
    return [engine.known().weights for engine in engines]


def _both_roles(engines: Sequence[EnginePeer]) -> bool:
    return len({engine.address.role for engine in engines}) == 2


def _most_updated(live: Sequence[EnginePeer]) -> WeightsName | None:
    """The name that most engines have which a trainer has updated. One that begins anew has the
    weights that it began with, which are not those that it is to have."""
    updated = [e for e in live if (state := e.known().weights).changes and state.is_named]
    names = Counter(WeightsName.of(e.known().namespace) for e in updated)
    for name, _ in names.most_common():
        if _both_roles([e for e in updated if WeightsName.of(e.known().namespace) == name]):
            return name
    return None
