"""The updates of one run, one after another, and whose weights each version is."""

from __future__ import annotations

from typing import NamedTuple

DISK, TENSOR, DISTRIBUTED = "disk", "tensor", "distributed"
WAYS = (DISK, TENSOR, DISTRIBUTED)
"""How weights come to the engines: SGLang's ``/update_weights_from_*``."""
ABORT, RETRACT, IN_PLACE = "abort", "retract", "in_place"
MODES = (ABORT, RETRACT, IN_PLACE)
"""Of ``/pause_generation``."""
KILLED = "d1"
"""The engine that is killed in the midst of an update."""


class Case(NamedTuple):
    """One update."""

    way: str
    mode: str
    killed: str = ""
    """An engine that gets SIGKILL between the two halves of the weights."""

    @property
    def name(self) -> str:
        return f"{self.way}, {self.mode}{', an engine killed' if self.killed else ''}"

    @property
    def plain(self) -> Case:
        """What plain SGLang does beside it."""
        return self._replace(killed="")


WITH_A_KILL = Case(TENSOR, ABORT, KILLED)


def make_cases(ways: tuple[str, ...] = WAYS, modes: tuple[str, ...] = MODES) -> list[Case]:
    """Every way in every mode; behind those by tensor one more, with a kill. What comes next shows
    whether the killed engine takes part again: there is a last one by disk for that."""
    cases = [Case(way, mode) for way in ways for mode in modes]
    if TENSOR in ways:
        cases.insert(len([c for c in cases if c.way != DISTRIBUTED]), WITH_A_KILL)
        if DISTRIBUTED not in ways:
            cases.append(Case(DISK, ABORT))
    return cases


BEFORE = "default"
"""SGLang's version of the weights that it begins with."""


def is_changed(version: str) -> bool:
    """Whether these are the changed weights, or those that the cluster begins with. Each update
    goes to the other ones; its version is its number, from 1 on."""
    return version != BEFORE and int(version) % 2 == 1
