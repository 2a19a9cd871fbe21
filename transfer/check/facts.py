"""What is in force on a device now: read from the kernel, tools and drivers, changing nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

import msgspec

from transfer.check.findings import EthernetFacts, RoceFacts
from transfer.traffic import cgroup
from transfer.traffic.classes import TrafficSettings
from transfer.traffic.host import PROGRAMS, CommandFailed, Host, run


def ethernet_facts(device: str, settings: TrafficSettings) -> EthernetFacts:
    """Of a device without RDMA."""
    absent = sorted({p for name, p in PROGRAMS.items() if shutil.which(name) is None})
    host = Host()
    folder = cgroup.find(settings.cgroup)
    return EthernetFacts(
        absent_packages=absent,
        queues_mbit=host.rate_mbit(device) if shutil.which("tc") else None,
        has_marks=_has_marks(host, device),
        has_group=folder is not None,
        group_pids=len(cgroup.members(folder)) if folder is not None else 0,
        may_join=folder is not None and os.access(folder / "cgroup.procs", os.W_OK),
    )


def _has_marks(host: Host, device: str) -> bool | None:
    if shutil.which("nft") is None:
        return False
    try:
        return host.has_marks(device)
    except CommandFailed:  # it takes root to see them
        return None


def roce_facts(device: str) -> RoceFacts:
    """Of a RoCE device, by iproute2's ``dcb``."""
    pfc = _dcb("pfc", "show", "dev", device, "prio-pfc").prio_pfc
    app = _dcb("app", "show", "dev", device, "dscp-prio").dscp_prio
    return parse_dcb(pfc, app)


Switch = bool | int | str


class _Dcb(msgspec.Struct, frozen=True):
    """What ``dcb -j`` prints: a switch for each priority; pairs of DSCP and priority."""

    prio_pfc: list[Switch] | None = None
    dscp_prio: list[tuple[int, int]] | None = None


def parse_dcb(pfc: Sequence[Switch] | None, app: Sequence[Sequence[int]] | None) -> RoceFacts:
    """From the fields of :class:`_Dcb`."""
    lossless = None
    if pfc is not None:
        lossless = [priority for priority, switch in enumerate(pfc) if switch in (True, "on")]
    return RoceFacts(lossless, None if app is None else {dscp: prio for dscp, prio in app})


def _dcb(*words: str) -> _Dcb:
    """Empty where the tool is absent or the driver does not know DCB."""
    if shutil.which("dcb") is None:
        return _Dcb()
    try:
        return msgspec.json.decode(run(("dcb", "-j", "-N", *words)) or "{}", type=_Dcb)
    except (CommandFailed, msgspec.DecodeError):
        return _Dcb()
