"""Puts rules for Ethernet in force on this machine, sees whether they are, and undoes them."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from transfer.traffic import cgroup
from transfer.traffic.classes import TrafficClass, TrafficSettings
from transfer.traffic.ethernet import (
    HANDLE,
    HIGH,
    LOW,
    TABLE_PREFIX,
    Command,
    EthernetRules,
    marking,
    receiver_of,
    sharing,
    table_of,
)

log = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 20.0
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables"}
"""What the rules are made with, and Debian's package of each."""
_KERNEL_DEFAULT = "0:"


class _Qdisc(msgspec.Struct, frozen=True):
    """A queueing discipline, as ``tc -j`` prints it."""

    kind: str
    handle: str
    root: bool = False


class Refused(Exception):
    """Nothing was changed; the message says what to do."""


class CommandFailed(Exception):
    """A program ended with an error; what it said."""


class Host:
    """One network namespace of this machine: the own one, or that of the prefix ``within``,
    such as ``("nsenter", "--net=/run/netns/x")``."""

    def __init__(self, within: Sequence[str] = ()) -> None:
        self._within = tuple(within)

    def apply(self, rules: EthernetRules, replace: bool = False) -> None:
        """Put the rules in force, in place of earlier ones of ours. Raises :class:`Refused` or
        :class:`CommandFailed`, and then none are in force.

        ``replace``: also in place of a queueing discipline that someone else has made.
        """
        self._check(rules, replace)
        self.remove(rules.device)
        if replace and self._foreign_root(rules.device):
            self._run("tc", "qdisc", "del", "dev", rules.device, "root")
        try:
            if rules.match == "cgroup":
                _cgroup_folder(rules.settings).mkdir(parents=True, exist_ok=True)
            for command in sharing(rules):
                self._run(*command)
            self._run("nft", "-f", "-", stdin=marking(rules))
        except (CommandFailed, OSError) as error:
            self.remove(rules.device, rules.settings.cgroup)
            raise CommandFailed(str(error)) from error

    def remove(self, device: str, group: str = "") -> list[str]:
        """Undo what :meth:`apply` did for the device, and nothing else; says what it was.

        ``group``: control group to remove as well, if it is empty and no other device's rules
        are in force.
        """
        self._check_able()
        done = []
        devices, receiver, table = self._devices(), receiver_of(device), table_of(device)
        if receiver in devices:
            if device in devices and self._qdiscs(device, "ingress"):
                self._run("tc", "qdisc", "del", "dev", device, "ingress")
            self._run("ip", "link", "del", "dev", receiver)
            done.append(f"receiving queues of {device} ({receiver})")
        if device in devices and self.has_queues(device):
            self._run("tc", "qdisc", "del", "dev", device, "root")
            done.append(f"sending queues of {device}")
        tables = self._tables()
        if table in tables:
            self._run("nft", "delete", "table", "inet", table)
            done.append(f"marks of {device}")
            tables.remove(table)
        folder = cgroup.find(group) if group else None
        if folder is not None and not tables and cgroup.remove(folder):
            done.append(f"control group {group}")
        return done

    def has_queues(self, device: str) -> bool:
        """Whether our classes share the device."""
        return any(qdisc.handle == HANDLE for qdisc in self._qdiscs(device))

    def has_marks(self, device: str) -> bool:
        """Whether nft marks what the low class sends through the device. Needs root."""
        return table_of(device) in self._tables()

    def sent_bytes(self, device: str) -> dict[TrafficClass, int]:
        """What has left the device in each class since :meth:`apply`, headers and all."""
        text = self._run("tc", "-s", "class", "show", "dev", device)
        counts = dict(re.findall(r"class htb (\S+) .*\n Sent (\d+) bytes", text))
        return {TrafficClass.HIGH: int(counts[HIGH]), TrafficClass.LOW: int(counts[LOW])}

    def rate_mbit(self, device: str) -> float | None:
        """Of our classes on the device; None without them."""
        if not self.has_queues(device):
            return None
        words = self._run("tc", "class", "show", "dev", device).split()
        ceilings = [words[n + 1] for n, word in enumerate(words) if word == "ceil"]
        units = {"Kbit": 1e-3, "Mbit": 1.0, "Gbit": 1e3, "bit": 1e-6}
        for unit, factor in units.items():
            if ceilings[0].endswith(unit):
                return float(ceilings[0].removesuffix(unit)) * factor
        return None

    # ---- what there is ------------------------------------------------------------------

    def _check(self, rules: EthernetRules, replace: bool) -> None:
        self._check_able()
        devices = self._devices()
        if rules.device not in devices:
            raise Refused(f"there is no network device {rules.device}, but {', '.join(devices)}")
        if rules.match == "cgroup" and cgroup.mount_point() is None:
            raise Refused(
                "cgroup v2 is not mounted: mount it, or tell the agents by --match uid:NUMBER"
            )
        foreign = self._foreign_root(rules.device)
        if foreign and not replace:
            raise Refused(
                f"{rules.device} has queues of someone else ({foreign}), which would go: "
                "remove them, or say --replace"
            )
        is_ours = receiver_of(rules.device) in devices
        if rules.receive and not is_ours and self._qdiscs(rules.device, "ingress", "clsact"):
            raise Refused(
                f"{rules.device} has filters of someone else for what comes in, which are left "
                "alone: do without --receive and --store"
            )

    def _check_able(self) -> None:
        if os.geteuid() != 0:
            raise Refused("queues and marks of a network device take root: run this as root")
        absent = {package for name, package in PROGRAMS.items() if shutil.which(name) is None}
        if absent:
            names = " ".join(sorted(absent))
            raise Refused(f"install the system packages {names} (Debian's names)")

    def _foreign_root(self, device: str) -> str:
        """Kind of a root discipline that is neither ours nor the kernel's own choice."""
        for qdisc in self._qdiscs(device):
            if qdisc.root and qdisc.handle not in (HANDLE, _KERNEL_DEFAULT):
                return qdisc.kind
        return ""

    def _qdiscs(self, device: str, *kinds: str) -> list[_Qdisc]:
        shown = self._run("tc", "-j", "qdisc", "show", "dev", device)
        found = msgspec.json.decode(shown or "[]", type=list[_Qdisc])
        return [qdisc for qdisc in found if not kinds or qdisc.kind in kinds]

    def _devices(self) -> list[str]:
        return [link["ifname"] for link in json.loads(self._run("ip", "-j", "link", "show"))]

    def _tables(self) -> list[str]:
        """Of ours, in nft."""
        found = json.loads(self._run("nft", "-j", "list", "tables"))["nftables"]
        names = [entry["table"]["name"] for entry in found if "table" in entry]
        return [name for name in names if name.startswith(TABLE_PREFIX)]

    def _run(self, *command: str, stdin: str = "") -> str:
        return run((*self._within, *command), stdin)


def keeps_apart(device: str, group: str = "") -> bool:
    """Whether this process, of the low class, does not disturb the high one on the device.

    ``group``: control group of the low class. Where it exists it is what the marks go by,
    so a process outside it has none, whatever queues there are.
    """
    folder = cgroup.find(group) if group else None
    if folder is not None and os.getpid() not in cgroup.members(folder):
        log.warning("not in control group %s: what is sent is not marked", group)
        return False
    try:
        return Host().has_queues(device)
    except CommandFailed as error:
        log.info("queues of nic=%s are not known: %s", device, error)
        return False


def run(command: Command, stdin: str = "") -> str:
    """What a program printed. Raises :class:`CommandFailed`."""
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CommandFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise CommandFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _cgroup_folder(settings: TrafficSettings) -> Path:
    root = cgroup.mount_point()
    assert root is not None  # checked before
    return root / settings.cgroup
