"""What is in force on a device now: read from the kernel, tools and drivers, changing nothing."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

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
    pfc = _dcb("pfc", "show", "dev", device, "prio-pfc").get("prio_pfc")
    app = _dcb("app", "show", "dev", device, "dscp-prio").get("dscp_prio")
    return parse_dcb(pfc, app)


def parse_dcb(pfc: list[Any] | None, app: list[list[int]] | None) -> RoceFacts:
    """From ``dcb -j``: a switch for each priority; pairs of DSCP and priority."""
    lossless = None
    if pfc is not None:
        lossless = [priority for priority, switch in enumerate(pfc) if switch in (True, "on")]
    return RoceFacts(lossless, None if app is None else {dscp: prio for dscp, prio in app})


def _dcb(*words: str) -> dict[str, Any]:
    """Empty where the tool is absent or the driver does not know DCB."""
    if shutil.which("dcb") is None:
        return {}
    try:
        found = json.loads(run(("dcb", "-j", "-N", *words)) or "{}")
    except (CommandFailed, json.JSONDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
