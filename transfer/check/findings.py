"""What follows from a machine's facts: whether the classes take effect, and what is missing.

Pure: the facts come from :mod:`transfer.check.machine` and :mod:`transfer.check.facts`.
"""

from __future__ import annotations

from enum import IntEnum

import msgspec

from transfer.check.machine import Machine, NetDevice, RdmaDevice, RdmaPort
from transfer.pacing.nics import nearest
from transfer.traffic.classes import TrafficSettings

RDMA_MTU_MIN = 4200
"""Of a RoCE device: RDMA's own largest packet, 4,096 bytes, with its headers."""


class State(IntEnum):
    """Of a device's traffic classes; the least comes first where several meet."""

    NONE = 1
    """Nothing tells the classes apart."""
    HALF = 2
    """Something is set that has no effect, or not the whole one."""
    UNPROVEN = 3
    """Set as far as can be seen from here."""
    EFFECT = 4
    """Set, or measured."""


class Finding(msgspec.Struct, frozen=True):
    state: State
    what: str
    """A sentence: what is, or is missing."""
    cost: str = ""
    """A sentence: what it costs, and what to do."""


class EthernetFacts(msgspec.Struct, frozen=True):
    """What is in force on a device without RDMA."""

    absent_packages: list[str]
    queues_mbit: float | None
    """Rate that our classes share; None without them."""
    has_marks: bool | None
    """None: not to be seen without root."""
    has_group: bool
    group_pids: int
    may_join: bool


class RoceFacts(msgspec.Struct, frozen=True):
    """What a RoCE device's driver says; None where it cannot be read."""

    lossless: list[int] | None
    """Priorities with flow control."""
    priority_of_dscp: dict[int, int] | None


_HARM = (
    "KV movement takes as much of the link as it can get from model traffic, unless the agents' "
    "pacer holds it back"
)


def judge_ethernet(
    device: NetDevice, facts: EthernetFacts, settings: TrafficSettings
) -> list[Finding]:
    """Of one device without RDMA."""
    name = device.name
    apply = f"run `python -m transfer.traffic --network ethernet --device {name} --apply` as root"
    if facts.absent_packages and facts.queues_mbit is None:
        packages = " ".join(facts.absent_packages)
        return [
            Finding(
                State.NONE,
                f"{name}: the programs that mark and share are not installed ({packages})",
                f"{_HARM}; install them, then {apply}",
            )
        ]
    found = []
    if facts.queues_mbit is None:
        if not facts.has_marks:
            return [Finding(State.NONE, f"{name} has no traffic classes", f"{_HARM}; {apply}")]
        found.append(
            Finding(
                State.HALF,
                f"{name}: packets are marked, but the device does not share by the marks",
                f"Only switches that know DSCP {settings.low.dscp} tell the classes apart; {apply}",
            )
        )
    else:
        found += _of_queues(device, facts, apply)
    found += _of_group(name, facts, settings, apply)
    if not found:
        state = State.EFFECT if facts.has_marks else State.UNPROVEN
        what = f"{name}: {facts.queues_mbit:g} Mbit/s are shared by class"
        what += f"; {facts.group_pids} processes are in the low class's control group now"
        if facts.has_marks is None:
            what += "; whether packets are marked is not to be seen without root"
        found.append(Finding(state, what))
    return found


def _of_queues(device: NetDevice, facts: EthernetFacts, apply: str) -> list[Finding]:
    found = []
    name, rate_mbit = device.name, device.link.rate_mbit
    if facts.has_marks is False:
        found.append(
            Finding(
                State.HALF,
                f"{name} shares by class, but nothing marks the low class's packets",
                f"All traffic is in the high class, so {_HARM}; {apply}",
            )
        )
    if rate_mbit and facts.queues_mbit is not None and facts.queues_mbit > rate_mbit:
        found.append(
            Finding(
                State.HALF,
                f"{name}: the classes share {facts.queues_mbit:g} Mbit/s, "
                f"but the link has {rate_mbit}",
                f"Packets queue behind the classes, in the order they came; {apply} --rate-mbit",
            )
        )
    return found


def _of_group(
    name: str, facts: EthernetFacts, settings: TrafficSettings, apply: str
) -> list[Finding]:
    group = settings.cgroup
    if not facts.has_group:
        return [
            Finding(
                State.HALF,
                f"{name}: the control group {group} of the agents does not exist",
                f"Agents start outside it, unmarked (ignore this with --match); {apply}",
            )
        ]
    if not facts.may_join and not facts.group_pids:
        return [
            Finding(
                State.HALF,
                f"{name}: this user may not start processes in the control group {group}",
                "Agents start outside it, unmarked: start the launcher as root, or tell agents "
                "by --match uid:NUMBER",
            )
        ]
    return []


def judge_rdma(
    device: RdmaDevice,
    port: RdmaPort,
    facts: RoceFacts | None,
    net: NetDevice | None,
    settings: TrafficSettings,
) -> list[Finding]:
    """Of one port of an RDMA device. ``facts`` and ``net``: of a RoCE port's network device."""
    name = f"{device.nic.name} port {port.number}"
    if not port.is_active:
        return [Finding(State.NONE, f"{name} is down", "Nothing moves through it")]
    if not port.is_ethernet:
        low = settings.low.service_level
        return [
            Finding(
                State.UNPROVEN,
                f"{name}: InfiniBand, {port.rate}; agents use service level {low}",
                "Its lane is the subnet manager's choice, not to be seen from here: print its "
                "lines with `python -m transfer.traffic --network ib`, and measure with --peer",
            )
        ]
    found = _of_roce_port(name, device, port, settings)
    found += _of_roce_device(name, port, facts, settings)
    if net is not None and net.link.mtu < RDMA_MTU_MIN:
        found.append(
            Finding(
                State.UNPROVEN,
                f"{name}: {net.name} has an MTU of {net.link.mtu}",
                f"RDMA sends packets of 1,024 bytes or less; set {RDMA_MTU_MIN} or more",
            )
        )
    is_half = any(finding.state <= State.HALF for finding in found)
    if facts is not None and facts.lossless and not is_half:
        priorities = ", ".join(map(str, facts.lossless))
        found.append(
            Finding(
                State.UNPROVEN,
                f"{name}: RoCE, {port.rate}; the host knows both classes, with flow "
                f"control on priorities {priorities}",
                "What the switches do is not to be seen from here: measure with --peer",
            )
        )
    return found


def _of_roce_port(
    name: str, device: RdmaDevice, port: RdmaPort, settings: TrafficSettings
) -> list[Finding]:
    found = []
    if not any(gid.kind == "RoCE v2" for gid in port.gids):
        found.append(
            Finding(
                State.HALF,
                f"{name} has no RoCE v2 address",
                "Its packets have no DSCP that a switch could read; give "
                f"{port.net_device or 'its network device'} an IP address",
            )
        )
    if port.forced_traffic_class is not None:
        path = f"/sys/class/infiniband/{device.nic.name}/tc/{port.number}/traffic_class"
        found.append(
            Finding(
                State.HALF,
                f"{name}: the driver gives every connection traffic class "
                f"{port.forced_traffic_class}, whatever a process asks for",
                f"Both classes look alike, so {_HARM}; write -1 to {path}",
            )
        )
    return found


def _of_roce_device(
    name: str, port: RdmaPort, facts: RoceFacts | None, settings: TrafficSettings
) -> list[Finding]:
    device = port.net_device or "DEVICE"
    show = f"print the commands with `python -m transfer.traffic --network roce --device {device}`"
    if facts is None or (facts.lossless is None and facts.priority_of_dscp is None):
        return [
            Finding(
                State.UNPROVEN,
                f"{name}: the priorities of {device} are not readable here",
                f"Look with mlnx_qos -i {device}, measure with --peer, or {show}",
            )
        ]
    found = []
    for title, marks in (("high", settings.high), ("low", settings.low)):
        if facts.lossless is not None and marks.priority not in facts.lossless:
            found.append(
                Finding(
                    State.HALF,
                    f"{name}: priority {marks.priority} of the {title} class has no flow control",
                    f"Full queues drop its packets, and RDMA then sends much again; {show}",
                )
            )
        known = facts.priority_of_dscp
        if known is not None and known.get(marks.dscp, 0) != marks.priority:
            found.append(
                Finding(
                    State.HALF,
                    f"{name}: DSCP {marks.dscp} of the {title} class has priority "
                    f"{known.get(marks.dscp, 0)}, not {marks.priority}",
                    f"It shares a queue with other traffic; {show}",
                )
            )
    return found


def judge_gpus(machine: Machine) -> list[Finding]:
    """GPUs that are far from every RDMA device."""
    active = [d.nic for d in machine.rdma if any(port.is_active for port in d.ports)]
    nodes = {nic.numa_node for nic in active}
    return [
        Finding(
            State.UNPROVEN,
            f"GPU {gpu.pci_path[-1]} (NUMA node {gpu.numa_node}) has no RDMA device on its node; "
            f"nearest: {', '.join(nearest(active, gpu)) or 'none'}",
            "Its KV crosses the link between the sockets, at about half the rate",
        )
        for gpu in machine.gpus
        if active and gpu.numa_node >= 0 and gpu.numa_node not in nodes
    ]
