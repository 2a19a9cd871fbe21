"""RoCE: what hosts and switches must be told so that the classes' DSCP has an effect.

Both classes are lossless (priority flow control), each with a queue of its own; the queues
share a port by weight. Everything else, TCP and so control messages, shares a third one that
may drop. Commands are in the vendors' syntax; no switch was at hand to try them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from transfer.traffic.classes import TrafficSettings

PRIORITIES = 8
REST_PERCENT = 10
"""Of a port, for what is neither class."""
_REST, _LOW, _HIGH = 0, 1, 2
_PROFILE = "dualpath"

SWITCHES = ("sonic", "cumulus", "arista")


def shares_percent(settings: TrafficSettings) -> dict[int, int]:
    """Queue -> its part of a port under contention: rest, low, high."""
    low = settings.low_share_percent
    return {_REST: REST_PERCENT, _LOW: low, _HIGH: 100 - REST_PERCENT - low}


def switch_shares_percent(settings: TrafficSettings) -> dict[int, int]:
    """The same by priority: a switch has a queue for each."""
    shares = shares_percent(settings)
    low, high = settings.low.priority, settings.high.priority
    return {0: shares[_REST], low: shares[_LOW], high: shares[_HIGH]}


def queue_of(priority: int, settings: TrafficSettings) -> int:
    """Queue of a host's port for a priority."""
    return {settings.low.priority: _LOW, settings.high.priority: _HIGH}.get(priority, _REST)


def lossless(settings: TrafficSettings) -> list[int]:
    """Priorities with flow control."""
    return sorted((settings.low.priority, settings.high.priority))


def host_dcb(settings: TrafficSettings, device: str) -> list[str]:
    """With iproute2's ``dcb``: any NIC whose driver knows DCB."""
    marks = (settings.high, settings.low)
    dscp = " ".join(f"{mark.dscp}:{mark.priority}" for mark in marks)
    pfc = " ".join(f"{priority}:on" for priority in lossless(settings))
    queues = " ".join(f"{p}:{queue_of(p, settings)}" for p in range(PRIORITIES))
    shares = shares_percent(settings)
    kinds = " ".join(f"{q}:{'ets' if q in shares else 'strict'}" for q in range(PRIORITIES))
    parts = " ".join(f"{queue}:{percent}" for queue, percent in shares.items())
    return [
        f"dcb app replace dev {device} dscp-prio {dscp}",
        f"dcb pfc set dev {device} prio-pfc all:off {pfc}",
        f"dcb ets set dev {device} prio-tc {queues} tc-tsa {kinds} tc-bw all:0 {parts}",
    ]


def host_mlnx(settings: TrafficSettings, device: str, rdma_device: str) -> list[str]:
    """With NVIDIA's tools. ``cma_roce_tos`` marks what marks nothing itself, and only that."""
    pfc = lossless(settings)
    shares = shares_percent(settings)
    queues = range(PRIORITIES)
    return [
        f"mlnx_qos -i {device} --trust dscp",
        *(
            f"mlnx_qos -i {device} --dscp2prio set,{marks.dscp},{marks.priority}"
            for marks in (settings.high, settings.low)
        ),
        f"mlnx_qos -i {device} --pfc {_listed(int(p in pfc) for p in queues)}",
        f"mlnx_qos -i {device} --prio_tc {_listed(queue_of(p, settings) for p in queues)}"
        f" --tsa {_listed('ets' if q in shares else 'strict' for q in queues)}"
        f" --tcbw {_listed(shares.get(q, 0) for q in queues)}",
        f"cma_roce_tos -d {rdma_device} -t {settings.high.traffic_class}",
    ]


def sonic(settings: TrafficSettings, port: str) -> str:
    """For ``config load``: JSON of SONiC's configuration database."""
    shares = switch_shares_percent(settings)
    same = {str(priority): str(priority) for priority in shares}
    classes = {marks.dscp: marks.priority for marks in (settings.low, settings.high)}
    name = _PROFILE.upper()
    return json.dumps(
        {
            "DSCP_TO_TC_MAP": {name: {str(dscp): str(classes.get(dscp, 0)) for dscp in range(64)}},
            "TC_TO_PRIORITY_GROUP_MAP": {name: same},
            "TC_TO_QUEUE_MAP": {name: same},
            "MAP_PFC_PRIORITY_TO_QUEUE": {name: {str(p): str(p) for p in lossless(settings)}},
            "SCHEDULER": {
                f"{_PROFILE}.{priority}": {"type": "DWRR", "weight": str(percent)}
                for priority, percent in shares.items()
            },
            "QUEUE": {
                f"{port}|{priority}": {"scheduler": f"{_PROFILE}.{priority}"} for priority in shares
            },
            "BUFFER_PG": {f"{port}|{p}": {"profile": "NULL"} for p in lossless(settings)},
            "PORT_QOS_MAP": {
                port: {
                    "dscp_to_tc_map": name,
                    "tc_to_pg_map": name,
                    "tc_to_queue_map": name,
                    "pfc_to_queue_map": name,
                    "pfc_enable": _listed(lossless(settings)),
                }
            },
        },
        indent=2,
    )


def cumulus(settings: TrafficSettings, port: str) -> list[str]:
    """NVUE commands."""
    lines = ["nv set qos mapping default-global trust l3"]
    for marks in (settings.low, settings.high):
        lines.append(
            f"nv set qos mapping default-global dscp {marks.dscp} switch-priority {marks.priority}"
        )
    for priority, percent in switch_shares_percent(settings).items():
        scheduler = f"nv set qos egress-scheduler default-global traffic-class {priority}"
        lines += [
            f"nv set qos egress-queue-mapping default-global switch-priority {priority} "
            f"traffic-class {priority}",
            f"{scheduler} mode dwrr",
            f"{scheduler} bw-percent {percent}",
        ]
    lines += [f"nv set qos pfc {_PROFILE} switch-priority {p}" for p in lossless(settings)]
    return [*lines, f"nv set interface {port} qos pfc profile {_PROFILE}", "nv config apply"]


def arista(settings: TrafficSettings, port: str) -> list[str]:
    """Lines of an EOS configuration."""
    lines = [
        f"qos map dscp {marks.dscp} to traffic-class {marks.priority}"
        for marks in (settings.low, settings.high)
    ]
    lines += [f"qos profile {_PROFILE}", "   qos trust dscp", "   priority-flow-control on"]
    lines += [f"   priority-flow-control priority {p} no-drop" for p in lossless(settings)]
    for priority, percent in switch_shares_percent(settings).items():
        lines += [
            f"   tx-queue {priority}",
            "      no priority",
            f"      bandwidth percent {percent}",
        ]
    return [*lines, f"interface {port}", f"   service-profile {_PROFILE}"]


def _listed(values: Iterable[object]) -> str:
    return ",".join(map(str, values))
