"""All that this project asks of Ray; no other module imports it.

The hosts of an engine are one placement group; on each, one actor has one child. Groups and actors
are *detached*: they outlive the driver, and the next one finds them by name. Ray starts no actor
again (``max_restarts=0``): the child of the old one may drain yet, and an engine's hosts begin
together.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.placement_group import (
    NODE_ID_LABEL_KEY,
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnHost
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

from launch.ray.commands import HostCommand
from launch.ray.host_process import HostProcess
from launch.ray.looks import Look, Where
from launch.ray.profile import Pool
from launch.settings import BadConfig

NAMESPACE = "dualpath"
HEAD_LOSS, HEAD_LOSS_DEFAULT_S, HEAD_LOSS_MIN_S = (
    "RAY_gcs_rpc_server_reconnect_timeout_s",
    60.0,
    3600.0,
)
"""In the environment of ``ray start``: so long a host lives on without Ray's head."""
MEMORY_MONITOR = "RAY_memory_monitor_refresh_ms"
"""Likewise: how often Ray looks whether memory is short, and then ends what it has started."""
_CALL_TIMEOUT_S = 10.0
_AGAIN_S = 1.0
_PREFIX = "dualpath/"
_BOARD = "dualpath-orders"
_PIN = 0.001
"""Of the resource that each host has of its own."""
DRIVER_SILENT_S = 10.0
"""After so long another driver may take over."""


class _Host:
    """One host's part. Ray runs all of it on the main thread of a worker process of its own, which
    the child's life hangs on (:mod:`launch.ray.host_process`)."""

    def __init__(self) -> None:
        self._environment = _given_to_ray()
        self._unfit = _unfit(self._environment)
        self._process: HostProcess | None = None

    def start(self, command: bytes, secret: str, environment: dict[str, str]) -> None:
        """Not in ``__init__``: what that is given, Ray's head keeps."""
        asked = msgspec.json.decode(command, type=HostCommand)
        own = {k: v for k, v in self._environment.items() if not k.startswith("RAY_")}
        self._process = HostProcess(asked, secret, own | environment)

    def look(self) -> bytes:
        process = self._process
        if process is None:
            return msgspec.json.encode(Look(waits=True))
        code = process.poll()  # before what it has said, which is complete then
        return msgspec.json.encode(Look(process.said(), code, process.waits, self._unfit))

    def command(self) -> bytes:
        return msgspec.json.encode(self._process.command if self._process else None)

    def end(self, at_once: bool) -> None:
        if self._process is not None:
            self._process.end(at_once)


class _Board:
    """What operators have ordered, until the driver takes it, and what became of it."""

    ORDERS_MAX = 16

    def __init__(self) -> None:
        self._orders: dict[int, bytes] = {}
        self._numbers: dict[str, int] = {}
        self._answers: dict[int, bytes] = {}
        self._last = 0
        self._driver, self._driver_s = "", 0.0

    def order(self, name: str, order: bytes) -> int:
        """Its number; 0: there are too many. One of the same name is the same order: whoever gives
        it may not have heard its number."""
        if name in self._numbers:
            return self._numbers[name]
        if len(self._orders) >= self.ORDERS_MAX:
            return 0
        self._last += 1
        self._orders[self._last] = order
        self._numbers[name] = self._last
        if len(self._numbers) > self.ORDERS_MAX:
            del self._numbers[next(iter(self._numbers))]
        return self._last

    def answer(self, number: int) -> bytes | None:
        return self._answers.get(number)

    def take(self, driver: str) -> dict[int, bytes] | None:
        """The orders, for the driver that asked first; None for another while that lives."""
        now = time.monotonic()
        if self._driver not in ("", driver) and now - self._driver_s < DRIVER_SILENT_S:
            return None
        self._driver, self._driver_s = driver, now
        return self._orders

    def took(self, last: int) -> None:
        """The driver has those up to that number; before, an answer may not have reached it."""
        self._orders = {n: order for n, order in self._orders.items() if n > last}

    def say(self, number: int, answer: bytes) -> None:
        self._answers[number] = answer
        for old in [n for n in self._answers if n <= number - self.ORDERS_MAX]:
            del self._answers[old]


def connect(address: str) -> None:
    """Raises :class:`BadConfig`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(
            address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadConfig(
            f"--ray-address {address}: {str(error).splitlines()[0]} Start Ray on every host first: "
            "`ray start` (docs/deploy.md)."
        ) from error


class Orders:
    """The board. Raises :class:`BadConfig` without one."""

    def __init__(self) -> None:
        try:
            self._board = ray.get_actor(_BOARD)
        except ValueError as error:
            raise BadConfig("no cluster was started here: `launch.cluster --ray`.") from error

    def order(self, order: bytes, lost_s: float) -> int:
        """Tries again for so long, while the board's process is lost and the driver has not made
        it anew."""
        began, name = time.monotonic(), secrets.token_hex(8)
        while True:
            try:
                return ray.get(self._board.order.remote(name, order), timeout=_CALL_TIMEOUT_S)
            except RayError as error:
                if time.monotonic() - began > lost_s:
                    raise BadConfig(f"Ray does not take the order: {sentence(error)}") from error
            time.sleep(_AGAIN_S)
            with contextlib.suppress(ValueError):  # there is none now
                self._board = ray.get_actor(_BOARD)

    def answer(self, number: int) -> bytes | None:
        """None also while Ray does not answer."""
        try:
            return ray.get(self._board.answer.remote(number), timeout=_CALL_TIMEOUT_S)
        except RayError:
            return None


class OrdersTaken:
    """The same for the driver, who makes it, and anew if its process was killed."""

    def __init__(self) -> None:
        self._board = self._made()
        self._last = 0
        """Of those that were taken."""

    def take(self, driver: str) -> dict[int, bytes] | None:
        try:
            orders = ray.get(self._board.take.remote(driver), timeout=_CALL_TIMEOUT_S)
        except ActorDiedError:
            self._board, self._last = self._made(), 0
            return {}
        new = {number: order for number, order in (orders or {}).items() if number > self._last}
        if new:
            self._last = max(new)
            self._board.took.remote(self._last)
        return new if orders is not None else None

    def say(self, number: int, answer: bytes) -> None:
        self._board.say.remote(number, answer)

    def remove(self) -> None:
        ray.kill(self._board)

    def _made(self) -> ActorHandle:
        # Softly, Ray may put it on a host that is lost before this one is.
        here = OnHost(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": _BOARD, "num_cpus": 0, "get_if_exists": True}
        return _actor(_Board, scheduling_strategy=here, **options)


class Group:
    """The hosts of one engine, one reader, or one gateway."""

    def __init__(self, name: str, group: PlacementGroup) -> None:
        self.name = name
        self._group = group
        self._actors: list[ActorHandle] = []
        self._asked: dict[int, ray.ObjectRef] = {}
        self._lost: dict[int, str] = {}

    def where(self) -> list[Where] | None:
        """None: Ray has found no room yet."""
        row = placement_group_table(self._group)
        if row["state"] != "CREATED":
            return None
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        nodes = row["bundles_to_node_id"]
        return [Where(nodes[bundle], addresses[nodes[bundle]]) for bundle in sorted(nodes)]

    def start(
        self, commands: Sequence[HostCommand], gpus: int, secret: str, environment: dict[str, str]
    ) -> None:
        """On each host its command; how that went, looks tell."""
        for bundle, command in enumerate(commands):
            actor = _actor(
                _Host,
                name=_actor_name(self.name, bundle),
                max_restarts=0,
                num_cpus=0,
                num_gpus=gpus,  # so that Ray says which
                scheduling_strategy=InGroup(self._group, bundle),
            )
            actor.start.remote(msgspec.json.encode(command), secret, environment)
            self._actors.append(actor)

    def adopt(self) -> list[HostCommand]:
        """What another driver has started; empty: not all of it is there any more."""
        bundles = range(len(self._group.bundle_specs))
        try:
            self._actors = [ray.get_actor(_actor_name(self.name, bundle)) for bundle in bundles]
            asked = [actor.command.remote() for actor in self._actors]
            told: list[bytes] = ray.get(asked, timeout=_CALL_TIMEOUT_S)
        except (ValueError, RayError):
            return []
        commands = [msgspec.json.decode(each, type=HostCommand | None) for each in told]
        return [command for command in commands if command is not None]

    def ask(self) -> list[ray.ObjectRef]:
        """What an answer is expected of."""
        for bundle, actor in enumerate(self._actors):
            if bundle not in self._asked and bundle not in self._lost:
                self._asked[bundle] = actor.look.remote()
        return list(self._asked.values())

    def answers(self, ready: set[ray.ObjectRef]) -> dict[int, Look]:
        """By host, of those that have answered, or are lost."""
        looks = {bundle: Look(lost=reason) for bundle, reason in self._lost.items()}
        for bundle, reference in list(self._asked.items()):
            if reference in ready:
                del self._asked[bundle]
                try:
                    looks[bundle] = msgspec.json.decode(ray.get(reference), type=Look)
                except ActorUnavailableError:  # it may answer again
                    continue
                except RayError as error:
                    self._lost[bundle] = sentence(error)
                    looks[bundle] = Look(lost=self._lost[bundle])
        return looks

    def end(self, at_once: bool = False) -> None:
        for bundle, actor in enumerate(self._actors):
            if bundle not in self._lost:
                actor.end.remote(at_once)

    def remove(self) -> None:
        """Actors are killed, which kills what is left of their children; the room is free."""
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)


class Places:
    """Ray's hosts. Methods raise ``RayError`` while Ray's head does not answer."""

    def __init__(self, address: str) -> None:
        connect(address)
        self.own_address: str = ray.util.get_node_ip_address()
        self._groups: dict[str, Group] = {}

    def create(
        self, name: str, pool: Pool, address: str = "", apart_from: Sequence[str] = ()
    ) -> Group:
        """Room for an engine, each host another one; on a certain host, if ``address`` is given,
        and on none of the hosts ``apart_from``, which are Ray's nodes."""
        pin = {f"node:{address}": _PIN} if address else {}
        others = {NODE_ID_LABEL_KEY: f"!in({','.join(apart_from)})"} if apart_from else {}
        labels = pool.labels | others
        group = placement_group(
            [pool.bundle | pin] * pool.nnodes,
            strategy="STRICT_SPREAD",
            name=_PREFIX + name,
            lifetime="detached",
            bundle_label_selector=[labels] * pool.nnodes if labels else None,
        )
        self._groups[name] = Group(name, group)
        return self._groups[name]

    def found(self) -> list[Group]:
        """What another driver has left."""
        rows = placement_group_table().values()
        names = [str(row["name"]) for row in rows if row["state"] != "REMOVED"]
        for name in (each for each in names if each.startswith(_PREFIX)):
            short = name.removeprefix(_PREFIX)
            self._groups[short] = Group(short, get_placement_group(name))
        return list(self._groups.values())

    def look(self, names: Sequence[str], wait_s: float) -> dict[str, dict[int, Look]]:
        """By name and host, what has been answered within ``wait_s``."""
        began = time.monotonic()
        asked = [reference for name in names for reference in self._groups[name].ask()]
        ready: list[ray.ObjectRef] = []
        if asked:
            ready, _ = ray.wait(asked, num_returns=len(asked), timeout=wait_s)
        looks = {name: self._groups[name].answers(set(ready)) for name in names}
        if not any(look.said for hosts in looks.values() for look in hosts.values()):
            time.sleep(max(0.0, began + wait_s - time.monotonic()))
        return looks


def _actor(kind: type, **options: object) -> ActorHandle:
    """A new one that outlives whoever makes it."""
    handle: ActorHandle = ray.remote(kind).options(lifetime="detached", **options).remote()
    return handle


def _actor_name(group: str, bundle: int) -> str:
    return f"{_PREFIX}{group}/{bundle}"


def sentence(error: RayError) -> str:
    """Of a text with much more in it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    why = [line for line in lines if "because" in line] or lines
    return why[0][:300] if why else type(error).__name__


def _unfit(environment: Mapping[str, str]) -> str:
    """What in the environment of ``ray start`` lets Ray end a cluster that serves."""
    faults = []
    if (alone_s := float(environment.get(HEAD_LOSS, HEAD_LOSS_DEFAULT_S))) < HEAD_LOSS_MIN_S:
        faults.append(f"ends all {alone_s:g} s after Ray's head ({HEAD_LOSS}=86400 helps)")
    if environment.get(MEMORY_MONITOR) != "0":
        faults.append(f"ends all while memory is short ({MEMORY_MONITOR}=0 helps)")
    return " and ".join(faults)


def _given_to_ray() -> dict[str, str]:
    """The environment of ``ray start`` on this host, without what Ray adds for its workers (such as
    one thread for each), but with the GPUs that it gave this one."""
    raylet = Path(f"/proc/{os.environ['RAY_RAYLET_PID']}/environ").read_bytes()
    pairs = [os.fsdecode(pair).partition("=") for pair in raylet.split(b"\0") if pair]
    found = {name: value for name, _, value in pairs}
    if devices := os.environ.get("CUDA_VISIBLE_DEVICES"):
        found["CUDA_VISIBLE_DEVICES"] = devices
    return found
