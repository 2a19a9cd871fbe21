"""Rules for Ethernet without RDMA: the kernel marks by sending process, and shares the link.

Two writers into one engine use one destination port, so a port does not tell the classes
apart; the sending process does. nft puts what the low class's senders send into one of two
HTB classes of the device, and marks it with a DSCP for switches. The other class, all
that is not marked, comes first; what it leaves, the low class may use.
"""

from __future__ import annotations

import ipaddress
import re
import shlex

import msgspec

from transfer.traffic import cgroup
from transfer.traffic.classes import CONTROL_DSCP, TrafficSettings

HANDLE = "d9a1:"
"""Of the queueing disciplines made here: how they are known again."""
ROOT, HIGH, LOW = f"{HANDLE}10", f"{HANDLE}1", f"{HANDLE}2"
RECEIVE_SHARE = 0.95
"""Of the link: packets that come in wait here only if the last switch sends no faster."""
BURST_BYTES_MIN = 64 * 1024
"""The largest packet that the kernel hands to a device."""
BURST_S = 0.001
TABLE_PREFIX = "dualpath_"
_RECEIVER_CHARS = 12

Command = tuple[str, ...]


class BadRules(ValueError):
    """Rules that cannot be; the message says what to change."""


class EthernetRules(msgspec.Struct, frozen=True):
    """What is to hold for one device. Build with :func:`make_rules`, which also checks it."""

    device: str
    rate_mbit: float
    """What the link carries, in each direction."""
    settings: TrafficSettings = TrafficSettings()
    match: str = "cgroup"
    """How senders of the low class are known: "cgroup", "uid:1001" or "source:10.0.0.5"."""
    receive: bool = False
    """Share what comes in as well, by the senders' DSCP and ``store``."""
    store: tuple[str, ...] = ()
    """Networks of a remote store behind this device: what comes from there is low."""


def table_of(device: str) -> str:
    """nft table of a device's marks."""
    return TABLE_PREFIX + re.sub(r"\W", "_", device)


def receiver_of(device: str) -> str:
    """Device through which packets pass that come in over ``device``."""
    return f"dp-{device[-_RECEIVER_CHARS:]}"  # the end tells the ports of a card apart


def make_rules(
    device: str,
    rate_mbit: float,
    settings: TrafficSettings,
    match: str = "cgroup",
    receive: bool = False,
    store: tuple[str, ...] = (),
) -> EthernetRules:
    """Raises :class:`BadRules`."""
    if not re.fullmatch(r"[^\s/\"]{1,15}", device):
        raise BadRules(f"{device!r} is no name of a network device")
    if not rate_mbit > 0:
        raise BadRules(f"rate {rate_mbit:g} Mbit/s of {device}: give the link's rate")
    match_expression(match, settings, "")
    for network in store:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise BadRules(f"store {network}: {error}; give a network such as 10.1.0.0/16") from (
                error
            )
    return EthernetRules(device, rate_mbit, settings, match, receive or bool(store), store)


def match_expression(match: str, settings: TrafficSettings, cgroup_root: str) -> str:
    """nft's words for the senders. ``cgroup_root``: of cgroup v2, below nft's folder."""
    kind, _, value = match.partition(":")
    if kind == "cgroup" and not value:
        level = len(settings.cgroup.split("/"))
        return f'socket cgroupv2 level {level} "{cgroup_root}{settings.cgroup}"'
    if kind == "uid" and value.isdigit():
        return f"meta skuid {value}"
    if kind == "source":
        try:
            address = ipaddress.ip_address(value)
        except ValueError as error:
            raise BadRules(f"match {match}: {error}") from error
        return f"{'ip' if address.version == 4 else 'ip6'} saddr {address}"
    raise BadRules(f"match {match!r}: give cgroup, uid:NUMBER or source:ADDRESS")


def marking(rules: EthernetRules) -> str:
    """Input of ``nft -f``; takes the place of what it made before."""
    # Of another container's packets, nft sees the address but not the process.
    hook = "postrouting" if rules.match.startswith("source") else "output"
    senders = match_expression(rules.match, rules.settings, _cgroup_root())
    table = table_of(rules.device)
    return f"""\
table inet {table} {{ }}
delete table inet {table}
table inet {table} {{
    chain low {{
        ip dscp {CONTROL_DSCP} return
        ip6 dscp {CONTROL_DSCP} return
        counter
        meta priority set {LOW}
        ip dscp set {rules.settings.low.dscp}
        ip6 dscp set {rules.settings.low.dscp}
    }}
    chain sent {{
        type filter hook {hook} priority mangle; policy accept;
        oifname "{rules.device}" {senders} jump low
    }}
}}
"""


def _cgroup_root() -> str:
    """Of cgroup v2 below nft's folder, such as "" or "unified/"."""
    root = cgroup.mount_point()
    if root is None or root == cgroup.NFT_ROOT or cgroup.NFT_ROOT not in root.parents:
        return ""
    return f"{root.relative_to(cgroup.NFT_ROOT)}/"


def sharing(rules: EthernetRules) -> list[Command]:
    """Commands that make the queues of a device that has none of ours."""
    commands = _queues(rules, rules.device, rules.rate_mbit)
    if rules.receive:
        commands += _receiving(rules)
    return commands


def _queues(rules: EthernetRules, device: str, rate_mbit: float) -> list[Command]:
    burst_bytes = max(BURST_BYTES_MIN, round(rate_mbit * 1e6 / 8 * BURST_S))
    share = rules.settings.low_share_percent / 100

    def htb(parent: str, name: str, part: float, more: str = "") -> Command:
        return _words(
            f"tc class add dev {device} parent {parent} classid {name} htb "
            f"rate {_mbit(rate_mbit * part)} ceil {_mbit(rate_mbit)} "
            f"burst {burst_bytes} cburst {burst_bytes} quantum {BURST_BYTES_MIN} {more}"
        )

    default = HIGH.removeprefix(HANDLE)
    return [
        _words(f"tc qdisc add dev {device} root handle {HANDLE} htb default {default}"),
        htb(HANDLE, ROOT, 1),
        htb(ROOT, HIGH, 1 - share, "prio 0"),
        htb(ROOT, LOW, share, "prio 7"),
    ]


def _receiving(rules: EthernetRules) -> list[Command]:
    device, receiver = rules.device, receiver_of(rules.device)

    def low(version: int, match: str) -> Command:
        protocol, family = ("ip", "ip") if version == 4 else ("ipv6", "ip6")
        priority = 1 if version == 4 else 2
        return _words(
            f"tc filter add dev {receiver} parent {HANDLE} protocol {protocol} prio {priority} "
            f"u32 match {family} {match} flowid {LOW}"
        )

    dscp = f"{rules.settings.low.traffic_class:#04x}"
    sources = [ipaddress.ip_network(network) for network in rules.store]
    return [
        _words(f"ip link add name {receiver} type ifb"),
        _words(f"ip link set dev {receiver} up"),
        *_queues(rules, receiver, rules.rate_mbit * RECEIVE_SHARE),
        low(4, f"dsfield {dscp} 0xfc"),
        low(6, f"priority {dscp} 0xfc"),
        *(low(source.version, f"src {source}") for source in sources),
        _words(f"tc qdisc add dev {device} handle ffff: ingress"),
        _words(
            f"tc filter add dev {device} parent ffff: protocol all prio 1 u32 match u32 0 0 "
            f"action mirred egress redirect dev {receiver}"
        ),
    ]


def script(rules: EthernetRules) -> str:
    """All of it as lines for a shell."""
    lines = []
    if rules.match == "cgroup":
        root = cgroup.mount_point() or cgroup.NFT_ROOT
        lines.append(shlex.join(("mkdir", "-p", str(root / rules.settings.cgroup))))
    lines += map(shlex.join, sharing(rules))
    return "\n".join(lines) + f"\nnft -f - <<'END'\n{marking(rules)}END\n"


def _words(line: str) -> Command:
    """Of a command without spaces inside its words."""
    return tuple(line.split())


def _mbit(rate: float) -> str:
    return f"{rate:g}mbit"
