"""Who sends in which traffic class, and how each class is marked. The only place that says so.

KV movement is *low*: it takes what *high* leaves (paper, "CNIC-centric traffic manager").
Mooncake reads its marks once a process, so the class is a property of the process, and what
counts is who sends the bytes, whoever asked for them: docs/traffic.md lists every sender.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import Enum

import msgspec


class TrafficClass(str, Enum):
    """Under contention HIGH gets all but a small share of a link; LOW gets the rest."""

    HIGH = "high"
    LOW = "low"


CLASS_OF_KIND: Mapping[str, TrafficClass] = {
    # Suffix KV to decode engines, model collectives, credits.
    "engine": TrafficClass.HIGH,
    # Requests, plans, answers.
    "gateway": TrafficClass.HIGH,
    # KV that was stored, or is to be: deliveries, uploads, requests to the remote store.
    "agent": TrafficClass.LOW,
}
"""Kind of a process record -> class of all that the process sends, its control messages aside."""

CONTROL_DSCP = 16
"""CS2 (RFC 4594: operations). An agent marks its control messages so by itself; the rules for
Ethernet leave packets marked so out of the low class."""

_MOONCAKE = ("MC_IB_SL", "MC_IB_TC")
_COLLECTIVES = {
    "NCCL_IB_SL": "NCCL_IB_TC",
    # DeepEP's all-to-all between experts.
    "NVSHMEM_IB_SL": "NVSHMEM_IB_TRAFFIC_CLASS",
}


class BadMarks(ValueError):
    """Marks that do not tell two classes apart; the message says what to change."""


class Marks(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one class shows in a packet."""

    service_level: int
    """InfiniBand, 0 to 15 (15 is the subnet's own management)."""
    dscp: int
    """RoCE and Ethernet, 0 to 63."""

    @property
    def traffic_class(self) -> int:
        """The byte in the packet's header: DSCP, and two bits for congestion."""
        return self.dscp << 2

    @property
    def priority(self) -> int:
        """0 to 7, for priority flow control: what NICs and switches make of a DSCP unasked."""
        return self.dscp >> 3


class TrafficSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a site may want otherwise. Build with :func:`read_settings`, which also checks it."""

    high: Marks = Marks(service_level=1, dscp=26)
    low: Marks = Marks(service_level=2, dscp=8)
    low_share_percent: int = 1
    """Of a link, that the low class always gets (Ethernet, RoCE)."""
    cgroup: str = "dualpath-low"
    """Of the senders of the low class, relative to the root of cgroup v2 (Ethernet)."""

    def marks(self, traffic_class: TrafficClass) -> Marks:
        return self.high if traffic_class is TrafficClass.HIGH else self.low


def read_settings(text: str = "{}") -> TrafficSettings:
    """From JSON; what is absent has its default. Raises :class:`BadMarks`."""
    try:
        settings = msgspec.json.decode(text or "{}", type=TrafficSettings)
    except msgspec.DecodeError as error:
        raise BadMarks(f"traffic settings {text!r}: {error}") from error
    for name in ("high", "low"):
        marks = getattr(settings, name)
        if not 0 <= marks.service_level <= 14:
            raise BadMarks(f"{name}.service_level {marks.service_level}: give 0 to 14")
        if not 0 <= marks.dscp <= 63:
            raise BadMarks(f"{name}.dscp {marks.dscp}: give 0 to 63")
    _check_apart(settings)
    return settings


def _check_apart(settings: TrafficSettings) -> None:
    high, low = settings.high, settings.low
    if high.service_level == low.service_level:
        raise BadMarks("high and low have one service_level: InfiniBand cannot tell them apart")
    if low.service_level == 0 or low.priority == 0:
        raise BadMarks("low: service_level 0 and DSCP 0 to 7 are what unmarked packets have")
    if high.priority == low.priority:
        raise BadMarks(
            f"DSCP {high.dscp} and {low.dscp} have one priority ({high.priority}, DSCP / 8): "
            "RoCE cannot tell them apart"
        )
    if CONTROL_DSCP >> 3 in (high.priority, low.priority):
        raise BadMarks(
            f"DSCP {CONTROL_DSCP} to {CONTROL_DSCP + 7} have the priority of control messages: "
            "choose others"
        )
    if not 1 <= settings.low_share_percent <= 50:
        raise BadMarks(f"low_share_percent {settings.low_share_percent}: give 1 to 50")
    parts = settings.cgroup.split("/")
    if not all(parts) or ".." in parts or not settings.cgroup.isprintable():
        raise BadMarks(f"cgroup {settings.cgroup!r}: give a path such as dualpath-low")


def rdma_env(
    kind: str, settings: TrafficSettings, operator: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Environment of a process of this kind where KV moves by RDMA.

    A mark for Mooncake in the operator's own environment would be every process's, so it
    is refused: :class:`BadMarks`. One for collectives is an engine's anyway, and stays.
    """
    own = [name for name in _MOONCAKE if name in operator]
    if own:
        raise BadMarks(
            f"{' and '.join(own)} in the environment would put engines and agents into one "
            "traffic class: unset it, and give marks of your own as --traffic JSON"
        )
    traffic_class = CLASS_OF_KIND[kind]
    marks = settings.marks(traffic_class)
    values = str(marks.service_level), str(marks.traffic_class)
    env = dict(zip(_MOONCAKE, values, strict=True))
    if traffic_class is TrafficClass.HIGH:
        for pair in _COLLECTIVES.items():
            if not any(name in operator for name in pair):
                env |= dict(zip(pair, values, strict=True))
    return env
