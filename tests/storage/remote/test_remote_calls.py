"""Requests to a store that fails now and then, and who yields to whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import pytest

from storage.block_format import HEADER_BYTES
from storage.remote.objects import calls as remote_calls
from storage.remote.objects.calls import ATTEMPTS_MAX, RemoteCalls
from storage.remote.objects.object_store import StoredObject
from storage.remote.packs.format import ROW, PackContents
from storage.remote.packs.pack import Pack
from storage.remote.packs.reads import GAP_BYTES_MAX, RUN_BYTES_MAX, cut_runs
from storage.remote.upload_pacer import UploadPacer
from storage.tiers.operation import Kind, Operation
from tests.storage.conftest import key_of


class ScriptedStore:
    """Every call does the next step of the script: an error is raised, a number slept."""

    def __init__(self, *script: Exception | float) -> None:
        self.script = list(script)
        self.calls = 0
        self._lock = threading.Lock()

    def _step(self) -> int:
        with self._lock:
            self.calls += 1
            number, step = self.calls, self.script.pop(0) if self.script else 0.0
        if isinstance(step, Exception):
            raise step
        time.sleep(step)
        return number

    def read(self, path: str, start: int, nbytes: int) -> bytes:
        return bytes([self._step()])

    def write(self, path: str, parts: Iterable[object]) -> None:
        list(parts)
        self._step()

    def create(self, path: str, data: bytes) -> bool:
        return bool(self._step())

    def list(self, folder: str) -> list[StoredObject]:
        self._step()
        return []

    def delete(self, path: str) -> None:
        self._step()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_calls, "BACKOFF_S", 0.001)


def test_errors_that_pass_are_not_seen() -> None:
    store = ScriptedStore(ConnectionError("reset"), OSError("503"), TimeoutError("late"))
    calls = RemoteCalls(store, timeout_s=5)
    assert calls.read("x", 0, 1) == bytes([4])
    assert calls.retries_total == 3


def test_every_attempt_of_an_upload_starts_from_its_beginning() -> None:
    begun = []

    def parts() -> Iterable[bytes]:
        begun.append(1)
        return [b"part"]

    RemoteCalls(ScriptedStore(OSError("500"), OSError("500")), timeout_s=5).write("x", parts)
    assert len(begun) == 3


@pytest.mark.parametrize("error", [FileNotFoundError("no"), PermissionError("no"), ValueError()])
def test_errors_that_stay_are_reported_at_once(error: Exception) -> None:
    store = ScriptedStore(error)
    with pytest.raises(type(error)):
        RemoteCalls(store, timeout_s=5).read("x", 0, 1)
    assert store.calls == 1


def test_attempts_are_bounded_in_number_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    store = ScriptedStore(*[OSError("down")] * 20)
    with pytest.raises(OSError, match="down"):
        RemoteCalls(store, timeout_s=5).list("")
    assert store.calls == ATTEMPTS_MAX
    monkeypatch.setattr(remote_calls, "BACKOFF_S", 10.0)
    start = time.monotonic()
    with pytest.raises(OSError, match="down"):
        RemoteCalls(store, timeout_s=0.1).delete("x")
    assert time.monotonic() - start < 10


def hedged(store: ScriptedStore, after_s: float) -> RemoteCalls:
    return RemoteCalls(store, timeout_s=5, hedge_after_s=after_s, threads=2)


def test_a_late_read_is_asked_for_again_and_the_first_answer_counts() -> None:
    store = ScriptedStore(1.0, 0.0)
    calls = hedged(store, 0.05)
    start = time.monotonic()
    assert calls.read("x", 0, 1) == bytes([2])
    assert time.monotonic() - start < 1 and calls.hedged_reads_total == 1


def test_a_read_in_time_is_asked_for_once() -> None:
    store = ScriptedStore()
    calls = hedged(store, 1.0)
    assert calls.read("x", 0, 1) == bytes([1])
    assert store.calls == 1 and calls.hedged_reads_total == 0


def test_the_slow_answer_counts_where_the_second_fails() -> None:
    calls = hedged(ScriptedStore(0.2, FileNotFoundError("no")), 0.05)
    assert calls.read("x", 0, 1) == bytes([1])


# ---- who yields ---------------------------------------------------------------------------


def waits(pacer: UploadPacer, nbytes: int) -> threading.Thread:
    thread = threading.Thread(target=lambda: pacer.wait_turn(nbytes), daemon=True)
    thread.start()
    thread.join(0.05)
    return thread


def test_without_reads_an_upload_goes_at_once() -> None:
    assert not waits(UploadPacer(), 1 << 30).is_alive()


def test_an_upload_waits_for_its_share_of_what_reads_get() -> None:
    pacer = UploadPacer(share=0.1, wait_s_max=60)
    pacer.read_begins(10_000)
    upload = waits(pacer, 100)
    assert upload.is_alive()
    pacer.read_ends(500)
    upload.join(0.05)
    assert upload.is_alive(), "reads have got 500 bytes, 1000 are due"
    pacer.read_ends(500)
    upload.join(5)
    assert not upload.is_alive()
    assert waits(pacer, 100).is_alive(), "the credit was used up"


def test_an_upload_goes_when_the_last_read_ends() -> None:
    pacer = UploadPacer(wait_s_max=60)
    with pacer.reading(1000):
        upload = waits(pacer, 1 << 30)
        assert upload.is_alive()
    upload.join(5)
    assert not upload.is_alive()


def test_a_store_that_answers_no_read_still_gets_uploads() -> None:
    pacer = UploadPacer(wait_s_max=0.1)
    pacer.read_begins(1)
    upload = waits(pacer, 1 << 30)
    upload.join(5)
    assert not upload.is_alive()


# ---- which blocks share a request -----------------------------------------------------------


def pack_of(*payload_bytes: int) -> Pack:
    rows, at = [], 0
    for number, nbytes in enumerate(payload_bytes):
        rows.append((key_of(number), at, nbytes, 0, 0, 0))
        at += HEADER_BYTES + nbytes
    return Pack("p/p", at, PackContents(np.array(rows, ROW), []))


def cut(pack: Pack, rows: Iterable[int], threads: int = 4) -> list[list[int]]:
    place: Callable[[int], Operation] = lambda row: Operation(Kind.READ, pack.key(row))  # noqa: E731
    runs = cut_runs([(pack, row, place(row)) for row in rows], threads)
    starts = [pack.span(row)[0] for row in range(len(pack.rows))]
    for run in runs:
        assert run.start == run.blocks[0][0]
        assert run.nbytes == run.blocks[-1][0] + run.blocks[-1][1] - run.start
    return [[starts.index(start) for start, _, _ in run.blocks] for run in runs]


def test_small_neighbours_share_a_request_in_any_order() -> None:
    assert cut(pack_of(*[1000] * 6), [3, 0, 2, 1]) == [[0, 1, 2, 3]]


def test_far_blocks_do_not() -> None:
    pack = pack_of(1000, 1000, GAP_BYTES_MAX, 1000)
    assert cut(pack, [0, 1, 3]) == [[0, 1], [3]]


def test_large_blocks_go_alone() -> None:
    assert cut(pack_of(*[RUN_BYTES_MAX] * 3), [0, 1, 2]) == [[0], [1], [2]]


def test_a_batch_is_spread_over_the_threads() -> None:
    pack = pack_of(*[256 << 10] * 16)
    assert len(cut(pack, range(16), threads=4)) >= 4
    assert len(cut(pack, range(16), threads=1)) == 3
