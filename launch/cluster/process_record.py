"""What there is to know of a process to run it, and to see whether it lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transfer.control.keys import Keys
from transfer.traffic.classes import CLASS_OF_KIND, TrafficClass


@dataclass(frozen=True)
class HealthCheck:
    """How to ask a process for a sign of life."""

    kind: str
    """"http": GET ``target``; "zmq": ``Ping`` to the control endpoint ``target``."""
    target: str
    any_status: bool = False
    """An HTTP answer of any status counts, not 200 alone."""
    server: str = ""
    """Who answers at a control endpoint,"""
    keys: Keys | None = field(default=None, repr=False)
    """and who asks."""


@dataclass(frozen=True)
class ProcessRecord:
    """All that is needed to run one process, on this machine or another."""

    name: str
    kind: str
    """"agent", "engine" or "gateway"."""
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """Added to the environment of whoever starts it."""
    host: str
    ports: Mapping[str, int]
    """Ports that must be free at the start, by purpose."""
    ready: tuple[HealthCheck, ...]
    """All must pass before the process counts as started."""
    alive: HealthCheck
    """Must keep passing from then on."""
    choices: Mapping[str, range] = field(default_factory=dict)
    """Ports of which it takes some at a start, others at later ones, by purpose."""
    secrets: bytes = field(default=b"", repr=False)
    """What this process alone may read: the content of a private file, whose path it gets in its
    environment (``common.process_settings.SECRETS``)."""
    cgroup: str = ""
    """Control group (v2) to start in, where it exists."""
    is_forked: bool = False
    """Is forked by :mod:`engine.cpu.fork_server`, if it can be."""
    together: str = ""
    """Processes with the same word here are started together, and all end when one does; empty:
    it is alone."""

    @property
    def traffic_class(self) -> TrafficClass:
        """Of all that it sends, control messages aside."""
        return CLASS_OF_KIND[self.kind]
