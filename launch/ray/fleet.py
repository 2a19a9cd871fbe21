"""What there is, brought to what is wanted: engines, readers and gateways as groups of hosts.

A step never waits for one of them. What is lost in part is ended whole, and begun anew.
"""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol
from urllib.parse import urlsplit

from launch.ray.commands import Commands, HostCommand
from launch.ray.looks import Look, Where
from launch.ray.profile import GATEWAY, Pool, Profile, is_gateway, number_of, pool_of

CANNOT_WORK = 2
"""Exit code of a command for settings with which it never will (:mod:`launch.node.__main__`)."""
BACKOFF_S, BACKOFF_MAX_S = 1.0, 15.0
STEADY_S = 60.0
"""Whoever has run for so long begins anew without a pause."""
END_MARGIN_S = 20.0
"""Beyond its drain a node needs so long at most."""
ROOM_S = 10.0
"""Whoever has no room for so long is said to wait."""


class Group(Protocol):
    """See :class:`launch.ray.places.Group`."""

    name: str

    def where(self) -> list[Where] | None: ...
    def start(
        self, commands: Sequence[HostCommand], gpus: int, secret: str, environment: dict[str, str]
    ) -> None: ...
    def adopt(self) -> list[HostCommand]: ...
    def end(self, at_once: bool = False) -> None: ...
    def remove(self) -> None: ...


class Places(Protocol):
    """See :class:`launch.ray.places.Places`."""

    own_address: str

    def create(
        self, name: str, pool: Pool, address: str = "", apart_from: Sequence[str] = ()
    ) -> Group: ...
    def found(self) -> Sequence[Group]: ...


class State(Enum):
    """Of a group."""

    WAITING = "waits for room"
    RUNNING = "runs"
    ENDING = "ends"


@dataclass
class _Unit:
    """An engine, a reader or a gateway."""

    group: Group
    since_s: float
    """Of its state."""
    state: State = State.WAITING
    commands: list[HostCommand] = field(default_factory=list)
    where: list[Where] = field(default_factory=list)
    patience_s: float = 0.0
    """Of one that ends."""
    ended: set[int] = field(default_factory=set)
    """Hosts on which nothing runs any more."""
    cut: dict[int, str] = field(default_factory=dict)
    """By host, the line that it has not said to its end."""

    def become(self, state: State, now_s: float) -> None:
        self.state, self.since_s = state, now_s

    @property
    def ports(self) -> range:
        first = self.commands[0].first_port if self.commands else 0
        return range(first, first + self.commands[0].ports if self.commands else 0)


class _Pauses:
    """Before a name is started again."""

    def __init__(self) -> None:
        self._until: dict[str, tuple[float, float]] = {}
        """By name: the end, and the length."""

    def begin(self, name: str, now_s: float, ran_s: float) -> None:
        _, last_s = self._until.get(name, (0.0, 0.0))
        length_s = min(max(BACKOFF_S, 2 * last_s), BACKOFF_MAX_S) if ran_s < STEADY_S else BACKOFF_S
        self._until[name] = now_s + length_s, length_s

    def hold(self, name: str, now_s: float) -> bool:
        return now_s < self._until.get(name, (0.0, 0.0))[0]

    def clear(self) -> None:
        self._until.clear()


class Fleet:
    """Of one cluster. ``say`` shows a line of one of them, or about it."""

    def __init__(
        self,
        places: Places,
        commands: Commands,
        secret: str,
        say: Callable[[str, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._places = places
        self._commands = commands
        self._secret = secret
        self._say = say
        self._clock = clock
        self._units: dict[str, _Unit] = {}
        self._pauses = _Pauses()
        self._cannot_work: set[str] = set()
        """Not started again before something else is ordered."""
        self.urls: list[str] = []
        """Of the gateways by their numbers, once all have hosts."""
        self._warned: set[str] = set()

    # ---- for the driver ---------------------------------------------------------------

    @property
    def running(self) -> list[str]:
        """Those of which something is to be heard."""
        return [name for name, unit in self._units.items() if unit.commands]

    @property
    def states(self) -> dict[str, State]:
        return {name: unit.state for name, unit in self._units.items()}

    def adopt(self, profile: Profile) -> Profile:
        """Take over what another driver has left, and want as much of it."""
        for group in self._places.found():
            unit = self._units[group.name] = _Unit(group, self._clock())
            unit.commands = group.adopt()
            if not unit.commands:
                self._end(group.name, 0)
                continue
            self.urls = unit.commands[0].urls
            unit.where, unit.state = group.where() or [], State.RUNNING
        counts = Counter(pool_of(name, profile.pools) for name in self._units)
        counts[GATEWAY] = len(self.urls) or profile.pools[GATEWAY].count
        for pool, count in counts.items():
            if pool:
                profile = profile.with_count(pool, count)
        if self._units:
            self._say("", f"taken over: {', '.join(self._units)}")
        return profile

    def changed(self) -> None:
        """Something else is ordered: what could not work is tried again."""
        self._cannot_work.clear()
        self._pauses.clear()

    def unmet(self, profile: Profile) -> list[str]:
        """How what there is differs from the profile."""
        wanted = profile.all_names(frozenset(self._units))
        missing = [name for name in wanted if name not in self._units]
        others = [
            f"{name} {unit.state.value}"
            for name, unit in self._units.items()
            if name not in wanted or unit.state is not State.RUNNING
        ]
        return [*(f"{name} is to be placed" for name in missing), *others]

    def step(self, profile: Profile, looks: Mapping[str, Mapping[int, Look]]) -> None:
        """Do what can be done now."""
        for name, unit in list(self._units.items()):
            for host, look in looks.get(name, {}).items():
                self._take(name, unit, host, look)
        wanted = profile.all_names(frozenset(self._units))
        for name, unit in list(self._units.items()):
            if name not in wanted and unit.state is not State.ENDING:
                self._end(name, max((c.drain_s for c in unit.commands), default=0))
            elif unit.state is State.WAITING:
                self._start(profile, name, unit)
            elif unit.state is State.ENDING:
                self._finish(name, unit)
        for name in wanted:
            is_paused = self._pauses.hold(name, self._clock())
            if name not in self._units and not is_paused and name not in self._cannot_work:
                self._create(profile, name)

    def end_step(self, looks: Mapping[str, Mapping[int, Look]]) -> bool:
        """Likewise, towards nothing: nodes, then the gateways. Whether there is nothing left."""
        nodes = [name for name in self._units if not is_gateway(name)]
        for name in nodes or list(self._units):
            unit = self._units[name]
            for host, look in looks.get(name, {}).items():
                self._take(name, unit, host, look)
            if unit.state is not State.ENDING:
                self._end(name, max((c.drain_s for c in unit.commands), default=0))
            self._finish(name, unit)
        return not self._units

    def end_at_once(self) -> None:
        for unit in self._units.values():
            unit.group.remove()
        self._units.clear()

    # ---- one of them ------------------------------------------------------------------

    def _create(self, profile: Profile, name: str) -> None:
        pool = profile.pools[pool_of(name, profile.pools)]
        if is_gateway(name):
            group = self._create_gateway(pool, name)
        else:  # nodes are told where the gateways are
            group = self._places.create(name, pool) if self.urls else None
        if group is not None:
            self._units[name] = _Unit(group, self._clock())

    def _create_gateway(self, pool: Pool, name: str) -> Group | None:
        """Where nodes know it. At first, on this host unless labels say where; a standby elsewhere,
        once the others have a place."""
        if self.urls:
            address = urlsplit(self.urls[number_of(name)]).hostname or ""
            return self._places.create(name, pool, address)
        others = [unit for other, unit in self._units.items() if is_gateway(other)]
        if not all(unit.where for unit in others):
            return None
        address = "" if pool.labels or others else self._places.own_address
        apart_from = [host.node for unit in others for host in unit.where]
        return self._places.create(name, pool, address, apart_from)

    def _start(self, profile: Profile, name: str, unit: _Unit) -> None:
        where = unit.group.where()
        if where is None:
            if self._clock() - unit.since_s > ROOM_S and name not in self._warned:
                self._warned.add(name)
                self._say(name, "waits for hosts with room and its labels (`ray status`)")
            return
        self._warned.discard(name)
        unit.where = where
        addresses = [host.address for host in where]
        gpus = 0
        if is_gateway(name):
            self.urls = self.urls or self._gateway_urls(profile)
            if not self.urls:
                return
            unit.commands = [self._commands.gateway(name, addresses[0], self.urls)]
        else:
            taken = [u.ports for u in self._units.values() if _share_a_host(u, unit)]
            unit.commands = self._commands.node(profile, name, self.urls, addresses, taken)
            gpus = profile.pools[pool_of(name, profile.pools)].gpus
        self._say(name, f"starts on {', '.join(addresses)}")
        unit.become(State.RUNNING, self._clock())
        environment = self._commands.secrets(profile, name)
        unit.group.start(unit.commands, gpus, self._secret, environment)

    def _gateway_urls(self, profile: Profile) -> list[str]:
        """Each is told of all; empty: not all have hosts yet."""
        names = profile.names(GATEWAY)
        units = [self._units[name] for name in names if name in self._units]
        hosts = [unit.where[0].address for unit in units if unit.where]
        return [self._commands.url(host) for host in hosts] if len(hosts) == len(names) else []

    def _take(self, name: str, unit: _Unit, host: int, look: Look) -> None:
        """What a host says of its part."""
        address = unit.where[host].address if host < len(unit.where) else "a lost host"
        label = name if len(unit.commands) == 1 else f"{name}@{address}"
        *lines, unit.cut[host] = (unit.cut.get(host, "") + look.said).split("\n")
        for line in lines:
            self._say(label, line.rstrip())
        if look.unfit and address not in self._warned:
            self._warned.add(address)
            self._say("", f"Ray on {address} {look.unfit}, as it was started (docs/deploy.md)")
        if look.waits and unit.state is State.RUNNING and label not in self._warned:
            self._warned.add(label)
            self._say(label, "waits for another of its name to end, which drains there")
        if look.exit_code is None and not look.lost or host in unit.ended:
            return
        self._warned.discard(label)
        unit.ended.add(host)
        self._say(label, f"lost: {look.lost}" if look.lost else _how_it_ended(look.exit_code))
        if unit.state is State.RUNNING:
            if look.exit_code == CANNOT_WORK:
                self._cannot_work.add(name)
                self._say(name, "not started again before something else is ordered")
            now_s = self._clock()
            self._pauses.begin(name, now_s, now_s - unit.since_s)
            self._end(name, 0)

    def _end(self, name: str, drain_s: float) -> None:
        unit = self._units[name]
        unit.become(State.ENDING, self._clock())
        unit.patience_s = drain_s + END_MARGIN_S
        if unit.commands:
            unit.group.end()

    def _finish(self, name: str, unit: _Unit) -> None:
        """Give up its room, once nothing runs there or it has had its time."""
        is_late = self._clock() - unit.since_s > unit.patience_s
        if len(unit.ended) == len(unit.commands) or is_late:
            if is_late:
                self._say(name, "has not ended in time: killed")
            unit.group.remove()
            del self._units[name]


def _share_a_host(one: _Unit, other: _Unit) -> bool:
    return bool({host.node for host in one.where} & {host.node for host in other.where})


def _how_it_ended(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"
