"""What operators ordered while the cluster runs, kept so that a restarted gateway obeys it too.

In a file of the run folder, which the supervisor makes and removes with the cluster: a new
cluster begins as its flags say.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

import msgspec

from scheduler.policies import POLICY_NAMES, UnknownPolicy
from scheduler.scheduler import Scheduler

log = logging.getLogger(__name__)


class KeptOrders(msgspec.Struct, forbid_unknown_fields=True):
    """The file, as JSON; and what a standby is told."""

    path_policy: str | None = None
    """None: the one of the flags."""
    drained: set[str] = msgspec.field(default_factory=set)
    """Engines and agents that get nothing new."""


class Orders:
    """Gives operators' orders to the scheduler, those before a restart included.

    ``names`` are all engines and agents there are: they can be told before they have reported, as
    after a restart. Without a ``run_folder`` orders are kept in memory only.
    """

    def __init__(
        self, scheduler: Scheduler, names: Collection[str], run_folder: Path | None
    ) -> None:
        self.names = names
        self._scheduler = scheduler
        self._held: set[str] = set()
        """Who is to get nothing new for another reason than an order."""
        self._file = run_folder / "orders.json" if run_folder is not None else None
        self._policies = tuple(dict.fromkeys((*POLICY_NAMES, scheduler.policy)))
        """An operator's own class is imported where the flag names it, never by order."""
        self._first_policy = scheduler.policy
        self.kept = KeptOrders()
        self._take(self._read())

    def set_policy(self, name: str) -> None:
        """Another path policy from the next plan on; raises ``UnknownPolicy``."""
        if name not in self._policies:
            raise UnknownPolicy(name, self._policies)
        self._scheduler.set_policy(name)
        self.kept.path_policy = name
        self._write()

    def drain(self, name: str, on: bool) -> None:
        """Nothing new for an engine or an agent, or again; raises ``KeyError``."""
        if name not in self.names:
            raise KeyError(name)
        if on:
            self.kept.drained.add(name)
        else:
            self.kept.drained.discard(name)
        self._obey(name)
        self._write()

    def hold(self, name: str, on: bool) -> None:
        """Nothing new for it while its node drains, or its lease has gone; orders stay."""
        if on:
            self._held.add(name)
        else:
            self._held.discard(name)
        self._obey(name)

    def forget(self, name: str) -> None:
        """It has left the cluster."""
        self._held.discard(name)
        if name in self.kept.drained:
            self.kept.drained.discard(name)
            self._write()
        self._scheduler.drain(name, False)

    def mirror(self, kept: KeptOrders) -> None:
        """Have the same as another gateway."""
        if kept != self.kept:
            self._take(kept)
            self._write()

    def _take(self, kept: KeptOrders) -> None:
        """All that can be obeyed of these, in place of those before."""
        if kept.path_policy not in (None, *self._policies):
            log.warning("order dropped: no path policy %r", kept.path_policy)
            kept.path_policy = None
        before, self.kept = self.kept, kept
        policy = kept.path_policy or self._first_policy
        if policy != self._scheduler.policy:
            self._scheduler.set_policy(policy)
        for name in before.drained | kept.drained:
            self._obey(name)

    def _obey(self, name: str) -> None:
        self._scheduler.drain(name, name in self.kept.drained or name in self._held)

    def _read(self) -> KeptOrders:
        """What can be obeyed of it: no order is worth a gateway that does not start."""
        if self._file is None or not self._file.exists():
            return KeptOrders()
        try:
            kept = msgspec.json.decode(self._file.read_bytes(), type=KeptOrders)
        except (OSError, msgspec.DecodeError) as error:
            log.warning("operators' orders are lost: %s: %s", self._file, error)
            return KeptOrders()
        for name in kept.drained.difference(self.names):
            log.warning("order kept for who may join: nobody is called %r", name)
        return kept

    def _write(self) -> None:
        if self._file is None:
            return
        written = self._file.with_suffix(".new")
        written.write_bytes(msgspec.json.encode(self.kept))
        written.replace(self._file)
