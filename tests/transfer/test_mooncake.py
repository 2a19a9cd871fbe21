"""The wrapper over real Mooncake, TCP on loopback; and host memory."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.preflight import check_libraries
from launch.settings import BadConfig
from tests.transfer.agent.fake_engine import LAYOUT, FakeEngine
from transfer import memory
from transfer.memory import HostMemory, NotEnoughMemory
from transfer.mooncake import (
    BYTES_PER_BATCH,
    DESCRIPTORS_PER_BATCH,
    OutOfBounds,
    PeerSuspended,
    TransferFailed,
    TransferPeer,
    batches,
    libraries_not_found,
    missing_libraries,
)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def clock():
    return Clock()


@pytest.fixture(scope="module")
def peer(clock):
    return TransferPeer("127.0.0.1", "tcp", retry_after_s=5.0, clock=clock)


REGISTERED: list[np.ndarray] = []
"""Kept until the end: Mooncake refuses memory that overlaps a region registered before, and a
freed array's address comes back."""


def registered(peer, nbytes: int) -> tuple[np.ndarray, int]:
    array = np.zeros(nbytes, np.uint8)
    REGISTERED.append(array)
    peer.register(int(array.ctypes.data), nbytes)
    return array, int(array.ctypes.data)


def ranges(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_more_ranges_than_mooncake_takes_at_once_arrive(peer):
    other = TransferPeer("127.0.0.1", "tcp")
    count, size = 6000, 16
    (source, at), (target, to) = registered(peer, count * size), registered(other, count * size)
    source[:] = np.random.default_rng(0).integers(0, 256, count * size)
    order = np.random.default_rng(1).permutation(count) * size
    lengths = np.full(count, size, np.int64)
    batch_count = []
    peer.write(
        other.session_id, at + order, to + order, lengths, lambda nbytes: batch_count.append(nbytes)
    )
    assert np.array_equal(source, target) and len(batch_count) == 6
    source[:] = 0
    peer.read(other.session_id, at + order, to + order, lengths)
    assert np.array_equal(source, target)


def test_a_local_range_outside_registered_memory_is_refused(peer):
    other = TransferPeer("127.0.0.1", "tcp")
    _, at = registered(peer, 4096)
    _, to = registered(other, 8192)
    for address, length in ((at - 1, 8), (at, 4097), (at + 4095, 2), (0, 8), (1 << 46, 8)):
        with pytest.raises(OutOfBounds):
            peer.write(other.session_id, ranges(at, address), ranges(to, to), ranges(8, length))
    peer.write(other.session_id, ranges(at), ranges(to), ranges(4096))


def test_a_dead_peer_is_refused_until_it_is_time_to_try_again(peer, clock):
    engine = FakeEngine("e", {})
    session = engine.session_id
    _, at = registered(peer, 4096)
    word = ranges(at), ranges(engine.board_address), ranges(8)
    peer.write(session, *word)
    engine.kill()
    with pytest.raises(TransferFailed) as failure:
        peer.write(session, *word)
    assert (failure.value.peer, failure.value.operation) == (session, "write")
    with pytest.raises(PeerSuspended):
        peer.read(session, *word)
    clock.now += 6
    other = "127.0.0.1:1"
    with pytest.raises(TransferFailed):
        peer.write(other, *word)
    assert list(peer._suspended_until) == [other]  # one that never comes back is not remembered
    with pytest.raises(TransferFailed):
        peer.write(session, *word)
    peer.forgive(session)
    with pytest.raises(TransferFailed):
        peer.write(session, *word)


SLOW_PEER = """
import sys
import numpy as np
from transfer.mooncake import TransferPeer
peer = TransferPeer("127.0.0.1", "tcp")
memory = np.zeros(int(sys.argv[1]), np.uint8)
peer.register(int(memory.ctypes.data), memory.nbytes)
print(peer.session_id, int(memory.ctypes.data), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("count", [1, 16])
def test_waiting_for_a_slow_peer_takes_no_processor(peer, count):
    size, stopped_s = 16 << 20, 0.6
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW_PEER, str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        session, to = child.stdout.readline().split()
        peer.meet(session, int(to))
        source, at = registered(peer, size)
        source[:] = np.random.default_rng(0).integers(0, 256, size)
        parts = np.arange(count) * (size // count)
        ranges = at + parts, int(to) + parts, np.full(count, size // count)
        child.send_signal(signal.SIGSTOP)  # its receive buffer is smaller than this write
        threading.Timer(stopped_s, child.send_signal, [signal.SIGCONT]).start()
        began_s, began_cpu_s = time.monotonic(), time.process_time()
        peer.write(session, *ranges)
        cpu_s = time.process_time() - began_cpu_s
        assert time.monotonic() - began_s > stopped_s / 2
        assert cpu_s < stopped_s / 4
        copy, back = registered(peer, size)
        peer.read(session, back + parts, int(to) + parts, ranges[2])
        assert np.array_equal(copy, source)
    finally:
        child.kill()
        child.communicate()


def test_host_memory_is_whole_pages_that_are_there():
    block = HostMemory(LAYOUT.block_bytes + 1)
    assert block.size_bytes % mmap.PAGESIZE == 0 and block.size_bytes > LAYOUT.block_bytes
    assert block.address % mmap.PAGESIZE == 0
    block.view[-1] = 7
    assert block.view[-1] == 7
    block.close()


def test_memory_that_the_host_lacks_is_refused_before_it_is_touched(monkeypatch):
    monkeypatch.setattr(memory, "_meminfo_bytes", lambda field: 1 << 20)
    with pytest.raises(NotEnoughMemory, match="choose a smaller"):
        HostMemory(2 << 20)


@given(st.lists(st.integers(1, 3 * BYTES_PER_BATCH), max_size=40), st.integers(1, 5000))
def test_batches_cover_all_ranges_within_the_limits(lengths, times):
    ranges = np.array((lengths * times)[:5000], np.int64)
    parts = batches(ranges)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(len(ranges)))
    for part in parts:
        count = part.stop - part.start
        assert 0 < count <= DESCRIPTORS_PER_BATCH
        assert count == 1 or ranges[part].sum() <= BYTES_PER_BATCH


def test_libraries_that_mooncakes_engine_lacks_are_named():
    assert missing_libraries() == []
    linked = """\tlinux-vdso.so.1 (0x00007f)
\tlibcurl.so.4 => not found
\tlibnuma.so.1 => /lib/x86_64-linux-gnu/libnuma.so.1 (0x00007f)
\tlibmlx5.so.1 => not found
"""
    assert libraries_not_found(linked) == ["libcurl.so.4", "libmlx5.so.1"]
    with pytest.raises(BadConfig, match=r"libcurl.so.4 \(Debian's libcurl4\), libmlx5.so.1"):
        check_libraries(libraries_not_found(linked))
