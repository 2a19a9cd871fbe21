"""One-sided reads and writes: the only module that imports Mooncake.

Mooncake's return codes become exceptions here. After a failure a peer is refused for a
while: with a hung one every call would otherwise cost a thread its timeout.
"""

from __future__ import annotations

import bisect
import ctypes
import importlib.util
import os
import re
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from transfer.ranges import Addresses, Ranges, cut_ranges

# Mooncake reads its environment once, when it is imported. Without these a hung peer holds a
# thread for 30 s and more; with them a call fails once no byte has moved for 2 s.
os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", "2")
os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", "2")
os.environ.setdefault("MC_TRANSFER_TIMEOUT", "10")
os.environ.setdefault("MC_LOG_LEVEL", "WARNING")

DESCRIPTORS_PER_BATCH = 1024
"""Mooncake's TCP transport refuses batches of 4,096 and more."""
BYTES_PER_BATCH = 16 << 20
"""Bounds the time of a batch, on a slow link below MC_TRANSFER_TIMEOUT."""
SPIN_S = 0.0001
"""A batch that is there by then is there sooner than a thread that sleeps."""
POLL_MIN_S, POLL_MAX_S, POLL_SHARE = 0.00005, 0.001, 0.05
"""Between two looks at a batch after that: a share of the time that it has taken so far."""
RETRY_AFTER_S = 5.0
LANES_MAX, READS_AT_ONCE = 16, 64
"""Connections to one peer that Mooncake keeps at most; enough reads to find each of them."""
TRANSFER_TIMEOUT_S = float(os.environ["MC_TRANSFER_TIMEOUT"])

Operation = Literal["write", "read"]

PACKAGE_OF = {
    "libibverbs.so.1": "Debian's libibverbs1",
    "librdmacm.so.1": "Debian's librdmacm1",
    "libnuma.so.1": "Debian's libnuma1",
    "libmlx5.so.1": "Debian's ibverbs-providers",
    "libcurl.so.4": "Debian's libcurl4",
    "libcuda.so.1": "NVIDIA's driver",
    "libcudart.so.13": "pip's nvidia-cuda-runtime, version 13",
}
"""Library that Mooncake's engine links -> where it comes from."""
_CUDA_RUNTIME = "libcudart.so.13"


class MooncakeEngine(Protocol):
    """What is used of Mooncake's ``TransferEngine`` (mooncake-integration/transfer_engine).

    Lists have an entry for each range. Codes are 0 for success; batches are numbered from 1.
    """

    def initialize(self, host: str, metadata: str, protocol: str, devices: str, /) -> int: ...
    def get_rpc_port(self) -> int: ...
    def register_memory(self, address: int, length: int, /) -> int: ...
    def batch_transfer_sync_write(
        self, peer: str, src: list[int], dst: list[int], lengths: list[int], /
    ) -> int: ...
    def batch_transfer_sync_read(
        self, peer: str, dst: list[int], src: list[int], lengths: list[int], /
    ) -> int: ...
    def batch_transfer_async_write(
        self, peer: str, src: list[int], dst: list[int], lengths: list[int], /
    ) -> int:
        """Number of a batch; 0: not begun."""

    def batch_transfer_async_read(
        self, peer: str, dst: list[int], src: list[int], lengths: list[int], /
    ) -> int:
        """Number of a batch; 0: not begun."""

    def get_batch_transfer_status(self, batches: list[int], /) -> int:
        """Returns when they have ended."""

    def transfer_check_status(self, batch: int, /) -> int:
        """Of a batch of one range: 0 under way, 1 done, else it has failed."""


class TransferFailed(Exception):
    """Mooncake refused or gave up an operation; its bytes may still land."""

    def __init__(self, peer: str, operation: str, code: int) -> None:
        super().__init__(f"{operation} with {peer} failed with code {code}")
        self.peer = peer
        self.operation = operation
        self.code = code


class PeerSuspended(Exception):
    """The peer failed a moment ago: not tried again yet, and nothing was sent."""

    def __init__(self, peer: str, retry_in_s: float) -> None:
        super().__init__(f"{peer} failed lately, next try in {retry_in_s:.1f} s")
        self.peer = peer
        self.retry_in_s = retry_in_s


class OutOfBounds(Exception):
    """A local range outside all registered memory. (TCP would read it all the same.)"""

    def __init__(self, address: int, length: int) -> None:
        super().__init__(f"{length} bytes at {address:#x} are not in registered memory")
        self.address = address
        self.length = length


class TransferPeer:
    """This process as a Mooncake peer. Thread-safe; calls block without holding the GIL.

    ``protocol`` is "tcp" or "rdma"; ``devices`` are RDMA device names, comma-separated,
    and empty for all of them (RDMA is untested: no such machine was at hand).
    """

    def __init__(
        self,
        host: str,
        protocol: str,
        devices: str = "",
        retry_after_s: float = RETRY_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
        engine: MooncakeEngine | None = None,
    ) -> None:
        """``engine``: what moves the bytes; None: Mooncake's own."""
        if protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        self._engine: MooncakeEngine = engine or _engine_type()()
        code = self._engine.initialize(host, "P2PHANDSHAKE", protocol, devices)
        if code != 0:
            raise TransferFailed(host, f"start over {protocol}", code)
        self.session_id = f"{host}:{self._engine.get_rpc_port()}"
        """What other peers call this one."""
        self._host = host
        self._retry_after_s = retry_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._suspended_until: dict[str, float] = {}
        self._moved_bytes: Counter[tuple[str, str]] = Counter()
        self._regions: list[tuple[int, int]] = []
        self._starts = self._ends = np.empty(0, np.int64)
        self._word = np.zeros(1, np.uint64)
        self.register(int(self._word.ctypes.data), self._word.nbytes)

    def register(self, address: int, length: int) -> None:
        """Make ``length`` bytes at ``address`` usable for transfers of both sides."""
        code = self._engine.register_memory(address, length)
        if code != 0:
            raise TransferFailed(self.session_id, f"registration of {length} bytes", code)
        with self._lock:
            bisect.insort(self._regions, (address, address + length))
            bounds = np.array(self._regions, np.int64)
            self._starts, self._ends = bounds[:, 0], bounds[:, 1]

    def meet(self, session_id: str, address: int) -> None:
        """Make the first contact: read 8 bytes at ``address``. Raises :class:`TransferFailed`.

        Mooncake shakes hands at the first transfer, and while a hung peer does not answer that
        (60 s), transfers with all other peers wait. So meet a peer as soon as it shows itself.
        """
        word = int(self._word.ctypes.data)
        for _ in range(2):
            # The first attempt may use, and so drop, what Mooncake knows of an earlier process
            # that had the same port.
            code = self._engine.batch_transfer_sync_read(session_id, [word], [address], [8])
            if code == 0:
                return
        raise TransferFailed(session_id, "first contact", code)

    def freshen(self, session_id: str, address: int) -> None:
        """After connections to this peer were cut: let Mooncake notice. It keeps some for the
        next transfers, and one that it does not know to be dead fails the transfer that gets it."""
        word = int(self._word.ctypes.data)
        reads = [np.full(READS_AT_ONCE, each, np.int64) for each in (word, address, 8)]
        for _ in range(LANES_MAX):
            if transfer_batch(self._engine, "read", session_id, *reads) == 0:
                return

    def forgive(self, session_id: str) -> None:
        """Try this peer again at once, e.g. since a new process has its address."""
        with self._lock:
            self._suspended_until.pop(session_id, None)

    def write(
        self,
        session_id: str,
        src: Addresses,
        dst: Addresses,
        lengths: Addresses,
        before_batch: Callable[[int], None] = lambda nbytes: None,
        batch_bytes: int = BYTES_PER_BATCH,
    ) -> None:
        """Copy local ranges ``src`` to the peer's ``dst``; all arrays have shape (ranges,).

        Returns when all bytes are in the peer's memory. ``before_batch`` runs before each
        batch, with its bytes (at most ``batch_bytes``), and may raise to stop there. Raises
        :class:`TransferFailed`, :class:`PeerSuspended` or :class:`OutOfBounds`.
        """
        self._transfer("write", session_id, Ranges(src, dst, lengths), before_batch, batch_bytes)

    def read(
        self,
        session_id: str,
        dst: Addresses,
        src: Addresses,
        lengths: Addresses,
        before_batch: Callable[[int], None] = lambda nbytes: None,
        batch_bytes: int = BYTES_PER_BATCH,
    ) -> None:
        """Copy the peer's ranges ``src`` to local ``dst``; otherwise like :meth:`write`."""
        self._transfer("read", session_id, Ranges(dst, src, lengths), before_batch, batch_bytes)

    def _transfer(
        self,
        operation: Operation,
        session_id: str,
        ranges: Ranges,
        before_batch: Callable[[int], None],
        batch_bytes: int,
    ) -> None:
        self._check_bounds(ranges.local, ranges.lengths)
        local, remote, lengths = cut_ranges(*ranges, batch_bytes)
        for part in batches(lengths, batch_bytes):
            nbytes = int(lengths[part].sum())
            before_batch(nbytes)
            self._refuse_suspended(session_id)
            code = transfer_batch(
                self._engine, operation, session_id, local[part], remote[part], lengths[part]
            )
            if code != 0:
                with self._lock:
                    now = self._clock()
                    still = {s: t for s, t in self._suspended_until.items() if t > now}
                    self._suspended_until = still | {session_id: now + self._retry_after_s}
                raise TransferFailed(session_id, operation, code)
            with self._lock:
                self._moved_bytes[operation, host_of(session_id)] += nbytes

    def is_local(self, session_id: str) -> bool:
        """Whether that peer has this one's address: bytes between them stay on the node."""
        return host_of(session_id) == self._host

    def moved_bytes(self) -> dict[tuple[str, str], int]:
        """("write" or "read", the peers' address) -> bytes so far."""
        with self._lock:
            return dict(self._moved_bytes)

    def _check_bounds(self, addresses: Addresses, lengths: Addresses) -> None:
        if not len(lengths):
            return
        with self._lock:
            starts, ends = self._starts, self._ends
        # As a rule all of them are in the DRAM tier: what is between its bounds is in it.
        first = int(np.searchsorted(starts, addresses.min(), side="right")) - 1
        if first >= 0 and (addresses + lengths).max() <= ends[first]:
            return
        region = np.searchsorted(starts, addresses, side="right") - 1
        # Region -1 is before the first start; the appended 0 makes it (or no regions) fail.
        outside = addresses + lengths > np.append(ends, 0)[region]
        if outside.any():
            first = int(np.argmax(outside))
            raise OutOfBounds(int(addresses[first]), int(lengths[first]))

    def _refuse_suspended(self, session_id: str) -> None:
        with self._lock:
            retry_in_s = self._suspended_until.get(session_id, 0.0) - self._clock()
            if retry_in_s <= 0:
                self._suspended_until.pop(session_id, None)
                return
        raise PeerSuspended(session_id, retry_in_s)


def missing_libraries() -> list[str]:
    """What Mooncake's engine links and this machine does not have; nothing is loaded."""
    package = importlib.util.find_spec("mooncake")
    folders = package.submodule_search_locations if package is not None else None
    engine = Path(next(iter(folders or [""]))) / "engine.so"
    linked = subprocess.run(
        ["ldd", engine], capture_output=True, text=True, check=False, timeout=20
    )
    return [
        name
        for name in libraries_not_found(linked.stdout)
        if not (name == _CUDA_RUNTIME and _cuda_runtime())
    ]


def libraries_not_found(linked: str) -> list[str]:
    """In the output of ldd."""
    return re.findall(r"^\s*(\S+) => not found", linked, re.MULTILINE)


def _cuda_runtime() -> Path | None:
    """Where pip has put it, beside torch: the loader does not look there by itself."""
    package = importlib.util.find_spec("nvidia")
    for folder in (package.submodule_search_locations or []) if package is not None else []:
        for library in Path(folder).glob(f"*/lib/{_CUDA_RUNTIME}"):
            return library
    return None


def _engine_type() -> Callable[[], MooncakeEngine]:
    if (runtime := _cuda_runtime()) is not None:
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    from mooncake.engine import TransferEngine

    return TransferEngine


def transfer_batch(
    engine: MooncakeEngine,
    operation: Operation,
    session_id: str,
    local: Addresses,
    remote: Addresses,
    lengths: Addresses,
) -> int:
    """Run one batch to its end with Mooncake's ``engine``; 0 if all of it has succeeded.

    Mooncake's own synchronous calls watch a batch in a loop without a pause: on a slow link a
    whole core is spent on waiting, and a few waiting threads of several processes keep a small
    machine from moving the bytes at all. Here the last range is a batch of its own, which
    can be asked for now and then; when it is there, the others are, or are about to be.
    """
    if operation == "write":
        submit, synchronous = engine.batch_transfer_async_write, engine.batch_transfer_sync_write
    else:
        submit, synchronous = engine.batch_transfer_async_read, engine.batch_transfer_sync_read
    here, there, sizes = local.tolist(), remote.tolist(), lengths.tolist()
    batch = submit(session_id, here[:-1], there[:-1], sizes[:-1]) if len(sizes) > 1 else None
    if batch == 0:  # the synchronous call also drops what Mooncake knows of a peer that is gone
        return synchronous(session_id, here, there, sizes)
    last = here[-1:], there[-1:], sizes[-1:]
    last_batch = submit(session_id, *last)
    code = _wait_asleep(engine, last_batch) if last_batch else synchronous(session_id, *last)
    if batch is not None:
        code = engine.get_batch_transfer_status([batch]) or code
    return code


def _wait_asleep(engine: MooncakeEngine, batch: int) -> int:
    """Until a batch of one range has ended, 0 if well; no longer than Mooncake's own calls."""
    began_s = time.monotonic()
    while (status := engine.transfer_check_status(batch)) == 0:
        waited_s = time.monotonic() - began_s
        if waited_s > TRANSFER_TIMEOUT_S:
            return -1
        if waited_s > SPIN_S:
            time.sleep(min(POLL_MAX_S, max(POLL_MIN_S, POLL_SHARE * waited_s)))
    return 0 if status == 1 else -1


def host_of(session_id: str) -> str:
    """The address in a peer's name."""
    return session_id.rpartition(":")[0]


def batches(lengths: Addresses, batch_bytes: int = BYTES_PER_BATCH) -> list[slice]:
    """Cut ranges into batches of at most DESCRIPTORS_PER_BATCH, and of at most ``batch_bytes``
    unless one range has more."""
    if not len(lengths):
        return []
    ends_bytes = np.cumsum(lengths)
    parts, start, done_bytes = [], 0, 0
    while start < len(lengths):
        end = int(np.searchsorted(ends_bytes, done_bytes + batch_bytes, side="right"))
        end = min(max(end, start + 1), start + DESCRIPTORS_PER_BATCH)
        parts.append(slice(start, end))
        start, done_bytes = end, int(ends_bytes[end - 1])
    return parts
