"""Hosts as network namespaces: two switches, and two rate-limited links to each host.

Everything of one run lies in namespaces named ``dptb<pid>-...``, so that a later run can tell
what a dead one left behind. The *control* namespace has both switches in it and an address on
each, without a limit: gateway, load generator and byte counters live there. The *store*
namespace, also without a limit, is where the S3 server listens.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "dptb"
COMMAND_TIMEOUT_S = 20.0
GONE_TIMEOUT_S = 5.0
BURST_BYTES = 128 * 1024
"""More than the largest packet that the kernel hands over (64 KiB), so none is dropped."""
OPEN_MBIT = 10_000
QUEUE_MS = 100
"""A packet that would wait longer for the link is dropped, and TCP slows down."""

STORAGE, COMPUTE = "storage", "compute"
_SUBNET = {STORAGE: "10.77.1", COMPUTE: "10.77.2"}
_CONTROL_HOST, _STORE_HOST, _FIRST_NODE = 254, 253, 1
_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_OWNER = re.compile(rf"{PREFIX}(\d+)-\S*")


class NetworkFailed(Exception):
    """A command of iproute2 failed."""


@dataclass(frozen=True)
class Rates:
    """Of each node's links, in either direction. Mbit/s as ``tc`` counts them."""

    storage_mbit: float
    compute_mbit: float


@dataclass(frozen=True)
class Counter:
    """Bytes that a node has received and sent over one NIC since it exists."""

    received_bytes: int
    sent_bytes: int


class Network:
    """``build``, use, ``remove``. ``nodes`` are short names such as ``p0``."""

    def __init__(self, nodes: Sequence[str], rates: Rates) -> None:
        self.nodes = list(nodes)
        self.rates = rates
        self.control = _name("control")
        self.store = _name("store")

    # ---- addresses ----------------------------------------------------------------------

    def namespace(self, node: str) -> str:
        return _name(node)

    def compute_address(self, node: str) -> str:
        return f"{_SUBNET[COMPUTE]}.{_FIRST_NODE + self.nodes.index(node)}"

    def storage_address(self, node: str) -> str:
        return f"{_SUBNET[STORAGE]}.{_FIRST_NODE + self.nodes.index(node)}"

    @property
    def store_address(self) -> str:
        """Of the S3 server, on the storage network."""
        return f"{_SUBNET[STORAGE]}.{_STORE_HOST}"

    def control_address(self, kind: str) -> str:
        """Of the control namespace, on the network of this kind."""
        return f"{_SUBNET[kind]}.{_CONTROL_HOST}"

    # ---- life ---------------------------------------------------------------------------

    def build(self) -> None:
        """Everything at once; what was built is removed if something fails."""
        try:
            self._build()
        except BaseException:  # a part is built, or none; a signal may have come
            self.remove()
            raise

    def _build(self) -> None:
        for namespace in (self.control, self.store, *map(self.namespace, self.nodes)):
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "dev", "lo", "up")
        for kind, subnet in _SUBNET.items():
            switch = f"{kind}-switch"
            _run("ip", "-n", self.control, "link", "add", "name", switch, "type", "bridge")
            _give_address(self.control, switch, f"{subnet}.{_CONTROL_HOST}")
        self._plug(self.store, STORAGE, "store", _STORE_HOST, None)
        for number, node in enumerate(self.nodes, _FIRST_NODE):
            space = self.namespace(node)
            self._plug(space, STORAGE, node, number, self.rates.storage_mbit)
            self._plug(space, COMPUTE, node, number, self.rates.compute_mbit)

    def _plug(
        self, namespace: str, kind: str, host: str, number: int, rate_mbit: float | None
    ) -> None:
        """A cable from the namespace to a switch; the device is named after the network."""
        port = _port(kind, host)
        cable = ("type", "veth", "peer", "name", port, "netns", self.control)
        _run("ip", "-n", namespace, "link", "add", "name", kind, *cable)
        switch = f"{kind}-switch"
        _run("ip", "-n", self.control, "link", "set", "dev", port, "master", switch, "up")
        _give_address(namespace, kind, f"{_SUBNET[kind]}.{number}")
        if rate_mbit is not None:
            for space, device in ((namespace, kind), (self.control, port)):
                _limit("add", space, device, rate_mbit)

    def remove(self) -> None:
        """Also ends whatever still runs in the namespaces."""
        remove_namespaces([n for n in list_namespaces() if owner_of(n) == os.getpid()])

    @contextlib.contextmanager
    def open_storage(self) -> Iterator[None]:
        """The storage links have no limit that matters; afterwards they have theirs again."""
        try:
            self._set_rate(STORAGE, OPEN_MBIT)
            yield
        finally:
            self._set_rate(STORAGE, self.rates.storage_mbit)

    def set_compute_rate(self, rate_mbit: float) -> None:
        """Of all nodes' compute links, from now on."""
        self._set_rate(COMPUTE, rate_mbit)

    def limit_compute(self, node: str) -> None:
        """What a node sends, after someone has taken the limit away."""
        _limit("add", self.namespace(node), COMPUTE, self.rates.compute_mbit)

    def _set_rate(self, kind: str, rate_mbit: float) -> None:
        for node in self.nodes:
            _limit("change", self.namespace(node), kind, rate_mbit)
            _limit("change", self.control, _port(kind, node), rate_mbit)

    def entered(self) -> AbstractContextManager[None]:
        """This process (its main thread, and threads and children started from it) is in the
        control namespace."""
        return entered(self.control)

    # ---- what flows ---------------------------------------------------------------------

    def storage_counters(self) -> dict[str, Counter]:
        """Of every node's storage NIC. To be called inside :meth:`entered`."""
        # Counted at the switch's ports, all in one file: what a port sends, the node receives.
        ports = parse_counters(Path("/proc/thread-self/net/dev").read_text())
        found = {node: ports[_port(STORAGE, node)] for node in self.nodes}
        return {node: Counter(c.sent_bytes, c.received_bytes) for node, c in found.items()}


def within(namespace: str) -> tuple[str, ...]:
    """What goes before a command that is to run in the namespace."""
    return ("ip", "netns", "exec", namespace)


def own_shared_memory() -> tuple[str, ...]:
    """What goes between, for one that is not to see other hosts' shared memory: in a namespace its
    mounts are its own already."""
    return ("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")


def own_mounts() -> None:
    """What this process mounts from now on nobody else sees, and it ends with the process; files
    in ``/dev/shm`` are ours alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        raise NetworkFailed(f"no mounts of our own: {os.strerror(ctypes.get_errno())}")
    _run("mount", "--make-rprivate", "/")
    _run("mount", "--make-rshared", "/")  # with the nodes, whose processes have mounts of their own
    _run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")


def parse_counters(text: str) -> dict[str, Counter]:
    """``/proc/net/dev``: device -> what it has received and sent."""
    counters = {}
    for line in text.splitlines()[2:]:
        device, _, fields = line.partition(":")
        values = fields.split()
        counters[device.strip()] = Counter(int(values[0]), int(values[8]))
    return counters


def _name(host: str) -> str:
    return f"{PREFIX}{os.getpid()}-{host}"


def _give_address(namespace: str, device: str, address: str) -> None:
    _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", device)
    _run("ip", "-n", namespace, "link", "set", "dev", device, "up")


def _port(kind: str, host: str) -> str:
    return f"{kind}-{host}"


def _limit(verb: str, namespace: str, device: str, rate_mbit: float) -> None:
    """Token bucket on what the device sends; ``verb`` is "add" or "change"."""
    bucket = ("tbf", "rate", f"{rate_mbit:g}mbit", "burst", str(BURST_BYTES))
    latency = ("latency", f"{QUEUE_MS}ms")
    _run("tc", "-n", namespace, "qdisc", verb, "dev", device, "root", *bucket, *latency)


@contextlib.contextmanager
def entered(namespace: str) -> Iterator[None]:
    """This thread, and threads and children started from it, are in the namespace."""
    with open("/proc/thread-self/ns/net") as home, open(f"/run/netns/{namespace}") as there:
        _set_namespace(there.fileno())
        try:
            yield
        finally:
            _set_namespace(home.fileno())


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise NetworkFailed(f"cannot enter the namespace: {os.strerror(ctypes.get_errno())}")


# ---- what dead runs have left -----------------------------------------------------------------


def list_namespaces() -> list[str]:
    """All that any run of the testbed has made."""
    lines = _run("ip", "netns", "list").splitlines()
    return [name for line in lines if owner_of(name := line.split()[0]) is not None]


def owner_of(name: str) -> int | None:
    """Process id of the run that a namespace or scratch folder is named after."""
    match = _OWNER.fullmatch(name)
    return int(match[1]) if match else None


def remove_leftovers(scratch: Path) -> list[str]:
    """Namespaces, with the processes in them, and folders under ``scratch`` of runs whose
    process is gone; to be called before this process has made any. Returns their names."""
    names = [name for name in list_namespaces() if _is_left(name)]
    remove_namespaces(names)
    folders = [path for path in scratch.glob(f"{PREFIX}*-*") if _is_left(path.name)]
    for folder in folders:
        _run("rm", "-rf", "--", str(folder))
    return names + [str(folder) for folder in folders]


def _is_left(name: str) -> bool:
    owner = owner_of(name)
    return owner is not None and (owner == os.getpid() or not Path(f"/proc/{owner}").exists())


def remove_namespaces(names: Sequence[str]) -> None:
    """End the processes in these namespaces, then remove them and their cables."""
    end = time.monotonic() + GONE_TIMEOUT_S
    while pids := {pid for name in names for pid in _pids(name)}:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > end:
            raise NetworkFailed(f"processes {sorted(pids)} do not end")
        time.sleep(0.1)
    for name in names:
        _run("ip", "netns", "delete", name)


def _pids(namespace: str) -> list[int]:
    """Its processes but this one, which may have entered it."""
    pids = map(int, _run("ip", "netns", "pids", namespace).split())
    return [pid for pid in pids if pid != os.getpid()]


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetworkFailed(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise NetworkFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
