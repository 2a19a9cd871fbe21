"""InfiniBand: lines for the subnet manager (opensm) that give the classes their lanes.

A packet's service level chooses one of four virtual lanes at every hop. Lane 2 is the
low class's and is missing from the high-priority table, whose lanes may send
``HIGH_LIMIT`` x 4 KiB before one packet of the other table: about 99 % for high (paper,
section on the CNIC-centric traffic manager).
"""

from __future__ import annotations

from transfer.traffic.classes import TrafficSettings

LANES = 4
LOW_LANE = 2
HIGH_LIMIT = 240
SERVICE_LEVELS = 16
_WEIGHT, _LOW_WEIGHT = 192, 64


def lane_of(service_level: int, settings: TrafficSettings) -> int:
    """Virtual lane of a service level: those that nobody here uses share lane 0."""
    if service_level == settings.low.service_level:
        return LOW_LANE
    if service_level == settings.high.service_level:
        return 1
    return service_level if service_level in (0, 1, 3) else 0


def opensm(settings: TrafficSettings) -> str:
    """Lines of ``opensm.conf``, for all kinds of nodes."""
    lanes = [lane_of(level, settings) for level in range(SERVICE_LEVELS)]
    high = {lane: 0 if lane == LOW_LANE else _WEIGHT for lane in range(LANES)}
    low = {**high, LOW_LANE: _LOW_WEIGHT}
    options = {
        "qos": "TRUE",
        "qos_max_vls": LANES,
        "qos_high_limit": HIGH_LIMIT,
        "qos_vlarb_high": _weights(high),
        "qos_vlarb_low": _weights(low),
        "qos_sl2vl": ",".join(map(str, lanes)),
    }
    return "".join(f"{name} {value}\n" for name, value in options.items())


def _weights(table: dict[int, int]) -> str:
    return ",".join(f"{lane}:{weight}" for lane, weight in table.items())
