"""Read assignment: which agent brings each hit block of a request into its memory.

A policy is a small class, chosen by name. It sees the hit and the cluster; it returns
who reads which consecutive blocks, and ends where a block has no possible reader.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Protocol

from common.experiment import NO_EXPERIMENT, Experiment
from scheduler.cluster_state import ClusterState
from scheduler.hit import Hit
from scheduler.one_reader import OneSide, RoundRobin, ShorterQueue
from scheduler.plan import Range
from scheduler.water_filling import WaterFilling


class ReadPolicy(Protocol):
    """Assigns readers. A class may also have ``rotates_engines = True``, or an ``experiment``."""

    def assign(self, hit: Hit, state: ClusterState) -> list[Range]:
        """Who reads what: covers a prefix of the hit, in order, each block once, and gives
        a block only to an agent for which :meth:`Holders.tier_at` has a tier."""


def experiment_of(policy: ReadPolicy) -> Experiment:
    """What a policy for measurements changes in the plans that it makes."""
    experiment: Experiment = getattr(policy, "experiment", NO_EXPERIMENT)
    return experiment


def rotates_engines(policy: ReadPolicy) -> bool:
    """Whether engines are taken in turns too."""
    return bool(getattr(policy, "rotates_engines", False))


class UnknownPolicy(ValueError):
    """No read assignment of that name."""

    def __init__(self, name: str, choices: Iterable[str], reason: str = "") -> None:
        named = ", ".join(choices)
        super().__init__(
            f"unknown path policy {name!r}{reason and f' ({reason})'}; choose one of {named}"
        )
        self.name = name


POLICIES: dict[str, Callable[[], ReadPolicy]] = {
    "prefill": lambda: OneSide("prefill"),
    "decode": lambda: OneSide("decode"),
    "round-robin": RoundRobin,
    "shorter-queue": ShorterQueue,
    "split": lambda: WaterFilling(anyone=False),
    "n-way": lambda: WaterFilling(anyone=True),
}
POLICY_NAMES = tuple(POLICIES)
OWN_CLASS = "module:Class"


def read_policy(name: str) -> ReadPolicy:
    """The policy of that name, or of an operator's own class ``module:Class``, built without
    arguments; raises :class:`UnknownPolicy` with the choices."""
    if name in POLICIES:
        return POLICIES[name]()
    if ":" not in name:
        raise UnknownPolicy(name, (*POLICY_NAMES, OWN_CLASS))
    try:
        return _own_policy(*name.split(":", 1))
    except Exception as error:  # of an operator's module: whatever it raises, it is no policy
        raise UnknownPolicy(name, (*POLICY_NAMES, OWN_CLASS), str(error)) from error


def _own_policy(module: str, attribute: str) -> ReadPolicy:
    """Nothing but a class with the method is called."""
    kind: object = getattr(importlib.import_module(module), attribute)
    if not isinstance(kind, type) or not callable(getattr(kind, "assign", None)):
        raise TypeError("it is no class with a method assign(hit, state)")
    policy: ReadPolicy = kind()
    return policy
