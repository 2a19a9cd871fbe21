"""``python -m launch.cluster --ray``: has Ray start a cluster on its hosts, and watches it.

Nothing that serves needs this process: killed, the cluster serves on, and the same command takes it
over. A signal ends all of it, in order.
"""

from __future__ import annotations

import os
import secrets
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console

from launch.cluster.config import ClusterConfig
from launch.flags.shared import cluster_secret
from launch.ray.commands import Commands
from launch.ray.fleet import Fleet
from launch.ray.looks import Look
from launch.ray.orders import Answer, Order, Outcome
from launch.ray.places import DRIVER_SILENT_S, OrdersTaken, Places, RayError, sentence
from launch.ray.profile import GATEWAY, Profile, load_pools, plain_profile, read_pools
from launch.settings import BadConfig, require

LOOK_S = 1.0
"""A round takes so long at most; all are looked at in it."""
LOST_HOST_S = 180.0
"""So long Ray may need to know that a host is lost, when its head is new."""

FRESH_HEAD = (
    "a head without its tables (RAY_REDIS_ADDRESS) that is started at the same address and port "
    "ends all that serves: give it another port, then bring host after host to it (docs/deploy.md)"
)
"""Hosts of the old one take it for theirs, are told that it is not, and end."""


def drive(config: ClusterConfig) -> int:
    """Until a signal; returns the exit code. Raises :class:`BadConfig`."""
    require(
        bool(config.cluster_secret_file),
        "--ray needs --cluster-secret-file, by which the next driver has the same secret. Make one "
        "with `(umask 077; openssl rand -hex 32 > FILE)`.",
    )
    file = Path(config.hosts).expanduser() if config.hosts else None
    profile = load_pools(file) if file else plain_profile(config.prefill, config.decode)
    Commands(config).check(profile)
    driver = _Driver(config, profile, file)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, driver.on_signal)
    return driver.run()


class _Driver:
    """One round after another."""

    def __init__(self, config: ClusterConfig, profile: Profile, file: Path | None) -> None:
        self._console = Console(highlight=False, soft_wrap=True, markup=False)
        self._name = secrets.token_hex(8)
        self._places = Places(config.ray_address)
        self._orders = OrdersTaken()
        self._given = self._taken_over()
        """Orders that are to be looked at."""
        self._commands = Commands(config)
        self._fleet = Fleet(self._places, self._commands, cluster_secret(config), self._say)
        if os.environ.get("RAY_AUTH_MODE") != "token":
            self._say("", "whoever reaches Ray's ports may run code: set RAY_AUTH_MODE=token")
        self._profile = self._fleet.adopt(profile)
        self._file = file
        self._read_s = _changed_s(file)
        self._unanswered: dict[int, str] = {}
        """Orders that are taken, with what was said of each last."""
        self._signals = 0
        self._was_met = False

    def _taken_over(self) -> dict[int, bytes]:
        """What was ordered meanwhile. Waits for as long as the last driver may have been killed,
        or a host of Ray's lost, and not yet be missed; raises :class:`BadConfig` then."""
        began = time.monotonic()
        while True:
            waited_s = time.monotonic() - began
            try:
                if (orders := self._orders.take(self._name)) is not None:
                    return orders
            except RayError as error:
                require(waited_s < LOST_HOST_S, f"Ray does not answer: {sentence(error)}.")
            else:
                require(
                    waited_s < 2 * DRIVER_SILENT_S,
                    "another `launch.cluster --ray` watches this cluster: end that one, or change "
                    "the cluster by `launch.scale`.",
                )
            time.sleep(LOOK_S)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1

    def run(self) -> int:
        is_answered = True
        while not self._signals:
            try:
                self._round()
                is_answered = True
            except RayError as error:  # the head is away: what serves needs it not
                if is_answered:
                    self._say("", f"Ray does not answer, the cluster serves on: {sentence(error)}")
                    self._say("", FRESH_HEAD)
                is_answered = False
                time.sleep(LOOK_S)
        self._say("", "ends: nodes drain; a second signal ends everything at once")
        while self._signals == 1 and not self._fleet.end_step(self._look()):
            pass
        self._fleet.end_at_once()
        self._orders.remove()
        return 0

    def _look(self) -> Mapping[str, Mapping[int, Look]]:
        return self._places.look(self._fleet.running, LOOK_S)

    def _round(self) -> None:
        self._take_orders()
        self._fleet.step(self._profile, self._look())
        unmet = self._fleet.unmet(self._profile)
        if not unmet and not self._was_met:
            names = ", ".join(self._fleet.states)
            urls = " or ".join(self._fleet.urls)
            self._say("", f"as wanted: {names}; {urls} serves once they say so")
        self._was_met = not unmet
        outcome = Outcome.TAKEN if unmet else Outcome.DONE
        for number, said in list(self._unanswered.items()):
            text = "; ".join(unmet) or ", ".join(self._fleet.states)
            if text != said:
                self._orders.say(number, msgspec.json.encode(Answer(outcome, text)))
                self._unanswered[number] = text
            if outcome is Outcome.DONE:
                del self._unanswered[number]

    # ---- orders -----------------------------------------------------------------------

    def _take_orders(self) -> None:
        given = self._given | (self._orders.take(self._name) or {})
        self._given = {}
        for number, encoded in given.items():
            try:
                order = msgspec.json.decode(encoded, type=Order)
                profile = self._profile
                if order.profile is not None:
                    profile = read_pools(order.profile, "--hosts")
                self._want(profile.scaled(order.changes))
            except (BadConfig, msgspec.DecodeError) as error:
                answer = Answer(Outcome.REFUSED, str(error))
                self._orders.say(number, msgspec.json.encode(answer))
            else:
                self._unanswered[number] = ""
        changed_s = _changed_s(self._file)
        if self._file and changed_s and changed_s != self._read_s:
            self._read_s = changed_s
            try:
                self._want(load_pools(self._file))
            except BadConfig as error:
                self._say("", f"goes on with the profile that it had: {error}")

    def _want(self, profile: Profile) -> None:
        """Raises :class:`BadConfig`, and wants what it did."""
        self._commands.check(profile)
        gateways = self._profile.pools[GATEWAY].count
        require(
            profile.pools[GATEWAY].count == gateways,
            f"pool {GATEWAY}: there are {gateways}, of which all nodes know: that number stays.",
        )
        self._profile = profile
        self._fleet.changed()
        pools = profile.pools.items()
        counts = ", ".join(f"{name} {pool.count}" for name, pool in pools if name != GATEWAY)
        self._say("", f"wanted: {counts}")

    def _say(self, whose: str, line: str) -> None:
        self._console.print(f"{whose + ' | ' if whose else ''}{line}")


def _changed_s(file: Path | None) -> float:
    """When it was written; 0 while it is not there."""
    try:
        return file.stat().st_mtime if file else 0.0
    except OSError:
        return 0.0
