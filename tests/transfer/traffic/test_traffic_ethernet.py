"""Rules for Ethernet, in a network namespace of the test's own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.control import keys
from transfer.agent.control_socket import ControlSocket
from transfer.traffic import cgroup, host
from transfer.traffic.classes import CONTROL_DSCP, TrafficClass, TrafficSettings
from transfer.traffic.ethernet import (
    BadRules,
    EthernetRules,
    make_rules,
    marking,
    match_expression,
    receiver_of,
    script,
    sharing,
)
from transfer.traffic.host import CommandFailed, Host, Refused, run

SITE = TrafficSettings(cgroup=f"dualpath-test-{os.getpid()}")
DEVICE = "compute-0"
NEIGHBOURS = ("10.78.0.7", "fd78::7")
NEEDED = all(map(shutil.which, host.PROGRAMS)) and os.geteuid() == 0
needs_root = pytest.mark.skipif(not NEEDED, reason="needs root, iproute2 and nftables")


def rules(**more) -> EthernetRules:
    return make_rules(DEVICE, 800, SITE, **more)


def within() -> tuple[str, ...]:
    return ("nsenter", f"--net=/run/netns/{namespace_name()}")


def namespace_name() -> str:
    return f"dptr{os.getpid()}"


@pytest.fixture
def node() -> Iterator[Host]:
    """A namespace with a device that leads nowhere, 10.78.0.1/24."""
    name = namespace_name()
    run(("ip", "netns", "add", name))
    try:
        cable = ("type", "veth", "peer", "name", "far")
        run(("ip", "-n", name, "link", "add", "name", DEVICE, *cable))
        for device in (DEVICE, "far", "lo"):
            run(("ip", "-n", name, "link", "set", "dev", device, "up"))
        run(("ip", "-n", name, "address", "add", "10.78.0.1/24", "dev", DEVICE))
        run(("ip", "-n", name, "address", "add", "fd78::1/64", "dev", DEVICE, "nodad"))
        for neighbour in NEIGHBOURS:
            at = ("lladdr", "02:00:00:00:00:07", "dev", DEVICE)
            run(("ip", "-n", name, "neigh", "add", neighbour, *at))
        yield Host(within())
    finally:
        run(("ip", "netns", "delete", name))
        root = cgroup.mount_point()
        if root is not None:
            cgroup.remove(root / SITE.cgroup)


# ---- what is printed --------------------------------------------------------------------------


def words_after(command: tuple[str, ...], word: str) -> str:
    return command[command.index(word) + 1]


def classes_of(commands: list[tuple[str, ...]], device: str) -> dict[str, tuple[str, str, str]]:
    """Class -> its parent, rate and ceiling."""
    return {
        words_after(command, "classid"): (
            words_after(command, "parent"),
            words_after(command, "rate"),
            words_after(command, "ceil"),
        )
        for command in commands
        if command[:3] == ("tc", "class", "add") and words_after(command, "dev") == device
    }


def test_high_is_promised_99_percent_and_either_class_may_have_it_all():
    found = classes_of(sharing(rules()), DEVICE)
    assert found == {
        "d9a1:10": ("d9a1:", "800mbit", "800mbit"),
        "d9a1:1": ("d9a1:10", "792mbit", "800mbit"),
        "d9a1:2": ("d9a1:10", "8mbit", "800mbit"),
    }
    root = sharing(rules())[0]
    assert root[:5] == ("tc", "qdisc", "add", "dev", DEVICE) and words_after(root, "default") == "1"


def test_what_comes_from_the_store_is_low_too():
    commands = sharing(rules(store=("10.9.0.0/16", "fd00::/8")))
    receiver = receiver_of(DEVICE)
    assert set(classes_of(commands, receiver)) == {"d9a1:10", "d9a1:1", "d9a1:2"}
    low = [command for command in commands if command[-2:] == ("flowid", "d9a1:2")]
    matched = [" ".join(command[command.index("match") :]) for command in low]
    assert matched == [
        "match ip dsfield 0x20 0xfc flowid d9a1:2",
        "match ip6 priority 0x20 0xfc flowid d9a1:2",
        "match ip src 10.9.0.0/16 flowid d9a1:2",
        "match ip6 src fd00::/8 flowid d9a1:2",
    ]


@pytest.mark.parametrize(
    ("match", "hook", "words"),
    [
        ("cgroup", "output", rf'socket cgroupv2 level 1 "\S*{SITE.cgroup}"'),
        ("uid:1001", "output", "meta skuid 1001"),
        ("source:10.0.0.5", "postrouting", "ip saddr 10.0.0.5"),
        ("source:fd00::5", "postrouting", "ip6 saddr fd00::5"),
    ],
    ids=["cgroup", "uid", "source", "source-6"],  # alike in every process, as pytest-xdist asks
)
def test_senders_are_told_apart_as_asked(match, hook, words):
    text = marking(rules(match=match))
    assert f"hook {hook} " in text
    assert re.search(rf'oifname "{DEVICE}" {words} jump low', text)


def test_nested_control_groups_have_their_level():
    settings = TrafficSettings(cgroup="dualpath.slice/low")
    expression = match_expression("cgroup", settings, "unified/")
    assert expression == 'socket cgroupv2 level 2 "unified/dualpath.slice/low"'


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "two words"}, "no name of a network device"),
        ({"device": "a-name-far-too-long"}, "no name of a network device"),
        ({"rate_mbit": 0}, "give the link's rate"),
        ({"match": "port:80"}, "cgroup, uid:NUMBER or source:ADDRESS"),
        ({"match": "source:here"}, "here"),
        ({"store": ("10.0.0.1/8",)}, "host bits"),
    ],
)
def test_rules_that_cannot_be_are_refused(changes, words):
    with pytest.raises(BadRules, match=words):
        make_rules(**{"device": DEVICE, "rate_mbit": 100, "settings": SITE, **changes})


# ---- what is in force -------------------------------------------------------------------------


def state() -> str:
    """Queues, filters and marks of the namespace, without counters."""
    inside = within()
    parts = [
        run((*inside, "tc", "qdisc", "show")),
        run((*inside, "tc", "class", "show", "dev", DEVICE)),
        run((*inside, "tc", "filter", "show", "dev", DEVICE, "ingress")),
        run((*inside, "nft", "-s", "list", "ruleset")),
    ]
    links = json.loads(run((*inside, "ip", "-j", "link", "show")))
    parts.append(" ".join(link["ifname"] for link in links))
    return re.sub(r"(refcnt|direct_packets_stat) \d+", "", "\n".join(parts))


@needs_root
@pytest.mark.parametrize("more", [{}, {"store": ("10.9.0.0/16",)}, {"match": "uid:1001"}])
def test_applied_twice_is_applied_once_and_removed_is_as_before(node, more):
    before = state()
    node.apply(rules(**more))
    applied = state()
    assert node.has_queues(DEVICE) and node.has_marks(DEVICE)
    assert node.rate_mbit(DEVICE) == 800
    node.apply(rules(**more))
    assert state() == applied != before
    assert node.remove(DEVICE, SITE.cgroup)
    assert state() == before and cgroup.find(SITE.cgroup) is None
    assert node.remove(DEVICE, SITE.cgroup) == []


@needs_root
def test_the_printed_script_does_the_same(node):
    wanted = rules(store=("10.9.0.0/16",))
    node.apply(wanted)
    applied = state()
    node.remove(DEVICE, SITE.cgroup)
    subprocess.run((*within(), "sh", "-e"), input=script(wanted), text=True, check=True)
    assert state() == applied


SENDER = """
import os, socket, sys
from transfer.traffic import cgroup
name, dscp, to = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with cgroup.entry(name) as entry:
    if entry is not None:
        cgroup.join(entry)
sender = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM)
if ":" in to:
    sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, dscp << 2)
else:
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)
for _ in range(20):
    sender.sendto(bytes(1000), (to, 9))
"""


def packets_sent_low(to: str, group: str, dscp: int = 0) -> int:
    """How many of 20 packets of a process in this group are in the low class."""
    inside = within()
    command = (*inside, sys.executable, "-c", SENDER, group, str(dscp), to)
    before = _packets("d9a1:2", DEVICE)
    subprocess.run(command, check=True, timeout=20)
    return _packets("d9a1:2", DEVICE) - before


def _packets(name: str, device: str) -> int:
    """Sent so far by a class of a device."""
    shown = run((*within(), "tc", "-s", "class", "show", "dev", device))
    sent = re.search(rf"class htb {name} .*\n Sent \d+ bytes (\d+) pkt", shown)
    return int(sent[1])


@needs_root
@pytest.mark.parametrize("to", NEIGHBOURS)
def test_only_senders_of_the_group_are_low_and_not_their_control_messages(node, to):
    node.apply(rules())
    assert packets_sent_low(to, SITE.cgroup) == 20
    assert 20_000 <= node.sent_bytes(DEVICE)[TrafficClass.LOW] < 25_000
    assert packets_sent_low(to, "") == 0
    assert packets_sent_low(to, SITE.cgroup, CONTROL_DSCP) == 0


ARRIVALS = """
import socket, struct
def packet(source, dscp):
    ends = socket.inet_aton(source) + socket.inet_aton("10.78.0.1")
    return struct.pack("!BBHHHBBH", 0x45, dscp << 2, 120, 1, 0, 64, 17, 0) + ends + bytes(100)
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("far", 0))
for source, dscp, count in (("10.9.0.5", 0, 20), ("10.78.0.7", 8, 30), ("10.78.0.7", 0, 40)):
    for _ in range(count):
        wire.send(b"\\xff" * 6 + bytes(6) + b"\\x08\\x00" + packet(source, dscp))
"""


@needs_root
def test_what_comes_in_from_the_store_or_marked_low_is_low(node):
    node.apply(rules(store=("10.9.0.0/16",)))
    subprocess.run((*within(), sys.executable, "-c", ARRIVALS), check=True, timeout=20)
    assert _packets("d9a1:2", receiver_of(DEVICE)) == 20 + 30
    assert _packets("d9a1:1", receiver_of(DEVICE)) >= 40


KEEPS_APART = """
import sys
from transfer.traffic import cgroup
from transfer.traffic.host import keeps_apart
device, group, joined = sys.argv[1:]
with cgroup.entry(joined) as entry:
    if entry is not None:
        cgroup.join(entry)
sys.exit(not keeps_apart(device, group))
"""


@needs_root
def test_a_process_knows_whether_its_packets_are_marked(node):
    def is_kept_apart(joined: str = "") -> bool:
        command = (*within(), sys.executable, "-c", KEEPS_APART, DEVICE, SITE.cgroup, joined)
        return subprocess.run(command, timeout=20).returncode == 0

    assert not is_kept_apart()
    node.apply(rules())
    assert is_kept_apart(SITE.cgroup) and not is_kept_apart()
    node.remove(DEVICE, SITE.cgroup)
    node.apply(rules(match="uid:1001"))
    assert is_kept_apart()


@needs_root
def test_queues_of_someone_else_stay_unless_they_may_go(node):
    inside = within()
    run((*inside, "tc", "qdisc", "add", "dev", DEVICE, "root", "handle", "7:", "htb"))
    before = state()
    with pytest.raises(Refused, match=r"someone else \(htb\).*--replace"):
        node.apply(rules())
    assert node.remove(DEVICE, SITE.cgroup) == []
    assert state() == before
    node.apply(rules(), replace=True)
    assert node.has_queues(DEVICE)


@needs_root
def test_filters_of_someone_else_are_never_touched(node):
    run((*within(), "tc", "qdisc", "add", "dev", DEVICE, "clsact"))
    before = state()
    with pytest.raises(Refused, match="do without --receive"):
        node.apply(rules(receive=True), replace=True)
    assert state() == before


@needs_root
def test_a_wrong_device_is_refused_with_the_right_ones(node):
    with pytest.raises(Refused, match=f"no network device eth9, but .*{DEVICE}"):
        node.apply(make_rules("eth9", 100, SITE))


@needs_root
def test_rules_that_the_kernel_refuses_leave_nothing(node):
    before = state()
    with pytest.raises(CommandFailed):
        node.apply(rules(match="uid:99999999999"))
    assert state() == before


def test_without_root_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for attempt in (lambda: Host().apply(rules()), lambda: Host().remove(DEVICE)):
        with pytest.raises(Refused, match="run this as root"):
            attempt()


def test_absent_programs_are_named(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "nft" else "/bin/" + name)
    with pytest.raises(Refused, match="nftables"):
        Host().apply(rules())


@needs_root
def test_control_messages_of_an_agent_are_marked():
    """What the rules rely on: the ROUTER's mark is on the packets of its connections."""

    async def marks() -> set[int]:
        router = ControlSocket("tcp://127.0.0.1:*", keys("a0"), [])
        try:
            port = int(router.endpoint.rpartition(":")[2])
            with sniffer("lo") as packets, socket.create_connection(("127.0.0.1", port), 5):
                return {await asyncio.to_thread(first_mark, packets, port)}
        finally:
            router.close()

    assert asyncio.run(marks()) == {CONTROL_DSCP}


def sniffer(device: str) -> socket.socket:
    ipv4 = 0x0800
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ipv4))
    packets.bind((device, ipv4))
    packets.settimeout(5)
    return packets


def first_mark(packets: socket.socket, port: int) -> int:
    """DSCP of the first packet with a payload that comes from the TCP port."""
    while True:
        packet = packets.recv(1 << 16)
        header = (packet[0] & 15) * 4
        is_tcp, source = packet[9] == 6, int.from_bytes(packet[header : header + 2], "big")
        if is_tcp and source == port and len(packet) > header + (packet[header + 12] >> 4) * 4:
            return packet[1] >> 2
