"""Which packs there are, whoever wrote them: one listing, and what it does not know yet."""

from __future__ import annotations

import logging
import queue
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from common.block import BlockLabel
from storage.index.owners import Selector
from storage.remote.objects.calls import RemoteCalls
from storage.remote.objects.object_store import StoredObject
from storage.remote.packs.format import (
    AHEAD_MS_MAX,
    TRAILER_BYTES,
    PackContents,
    PackDamaged,
    UnknownPackVersion,
    decode_footer,
    footer_bytes,
    is_far_ahead,
    is_pack_path,
    now_ms,
    scan,
    written_ms_of,
)
from storage.remote.packs.manifest import ManifestUnusable, decode_manifest, sequence_of
from storage.remote.packs.pack import Pack
from storage.tiers.io_threads import IoThreads

logger = logging.getLogger(__name__)

TAIL_BYTES = 64 << 10
"""Read at once: the footer of about 1,000 blocks."""
SCAN_BYTES_MAX = 1 << 30
"""A larger pack is left alone if its footer is damaged."""
FOOTER_THREADS = 16
_DROP_NAME = re.compile(r"drops/[0-9a-f]{12}-[0-9a-f]{16}\.json")


class Drop(msgspec.Struct, frozen=True):
    """Blocks of these owners that were written by then are dropped. Both times are of
    :class:`storage.remote.packs.format.PackClock`."""

    selector: Selector
    before_ms: int


def new_drop_path(drop: Drop) -> str:
    """Below the remote URL; no two are alike."""
    return f"drops/{drop.before_ms:012x}-{secrets.token_hex(8)}.json"


def misdated(drops: Mapping[str, Drop]) -> dict[str, Drop]:
    """Those from a clock far ahead, as they are understood here, by path."""
    named_ms = {path: int(path.removeprefix("drops/")[:12], 16) for path in drops}
    return {
        path: Drop(drop.selector, min(drop.before_ms, now_ms()))
        for path, drop in drops.items()
        if is_far_ahead(named_ms[path])
    }


def knows_all(objects: Iterable[StoredObject], packs: Iterable[Pack]) -> bool:
    """Whether every pack of a listing is among these. Others may be unreadable here, of another
    version, or more than the index takes: what covers or describes them is needed."""
    known = {pack.path for pack in packs}
    return all(found.path in known for found in objects if is_pack_path(found.path))


def dropped_before_ms(drops: Iterable[Drop], label: BlockLabel) -> int:
    """Blocks with this label that were written by then are dropped; -1: none."""
    before = [d.before_ms for d in drops if d.selector.value_of(label.owner) is not None]
    return max(before, default=-1)


def is_left(written_ms: NDArray[np.int64], before_ms: int | NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which blocks the drops leave that :func:`dropped_before_ms` told. One that was written far
    in the future was written by a wrong clock, nobody knows when: every drop takes it."""
    is_known_later = (written_ms > before_ms) & (written_ms <= now_ms() + AHEAD_MS_MAX)
    return is_known_later | (np.asarray(before_ms) < 0)


class PackFound(NamedTuple):
    pack: Pack


class PacksGone(NamedTuple):
    paths: list[str]


class DropFound(NamedTuple):
    path: str
    drop: Drop


class DropsGone(NamedTuple):
    paths: list[str]


class Refreshed(NamedTuple):
    """All that lay in the store when look ``number`` began has been reported."""

    number: int
    objects: list[StoredObject]


News = PackFound | PacksGone | DropFound | DropsGone | Refreshed


class PackCatalog:
    """Looks in a thread of its own: at start, every ``refresh_s``, and when asked to.

    ``report`` is called in that thread, with packs in the order in which footers are read.
    """

    def __init__(
        self, calls: RemoteCalls, report: Callable[[News], None], refresh_s: float
    ) -> None:
        self._calls = calls
        self._report = report
        self._refresh_s = refresh_s
        self._begun = 0
        self._known: set[str] = set()
        """Reported or not readable: packs and drops."""
        self.unreadable_packs_total = 0
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self._footer_threads = IoThreads("remote-footer", FOOTER_THREADS)
        self._thread = threading.Thread(target=self._run, name="remote-catalog", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        self._closed.set()
        self._wanted.set()
        self._footer_threads.close(timeout_s)
        self._thread.join(timeout_s)

    def look(self) -> int:
        """Ask for a look that begins from now on; returns its number."""
        number = self._begun + 1
        self._wanted.set()
        return number

    def note(self, path: str) -> None:
        """This process has written the object: it need not be reported. For any thread."""
        self._known.add(path)

    # ---- the thread -------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wanted.clear()
            self._begun += 1
            try:
                self._look_around(self._begun)
            except Exception as error:  # of any store's library; the next look may do better
                logger.warning("cannot look what the remote tier holds: %s", error)
                self._closed.wait(1.0)
                self._wanted.set()
            self._wanted.wait(self._refresh_s)

    def _look_around(self, number: int) -> None:
        known = set(self._known)  # what is noted while the listing runs may not be in it
        objects = self._calls.list("")
        listed = {found.path for found in objects if is_pack_path(found.path)}
        drops = {found.path for found in objects if _DROP_NAME.fullmatch(found.path)}
        gone = [path for path in known - listed - drops if is_pack_path(path)]
        drops_gone = [path for path in known - drops if _DROP_NAME.fullmatch(path)]
        for path in sorted(drops - known):
            self._read_drop(path)
        new = [found for found in objects if found.path in listed - self._known]
        if number == 1:
            new = self._from_manifest(objects, new)
        for found, contents in self._footers(new):
            self._known.add(found.path)
            if contents is not None:
                self._report(PackFound(Pack(found.path, found.nbytes, contents)))
        if gone:  # last: what was rewritten is in a new pack by now
            self._known.difference_update(gone)
            self._report(PacksGone(gone))
        if drops_gone:
            self._known.difference_update(drops_gone)
            self._report(DropsGone(drops_gone))
        self._report(Refreshed(number, objects))

    def _read_drop(self, path: str) -> None:
        try:
            drop = msgspec.json.decode(self._calls.read(path, 0, 1 << 16), type=Drop)
        except (msgspec.DecodeError, FileNotFoundError) as error:
            logger.warning("%s is not used: %s", path, error)
        else:
            if is_far_ahead(drop.before_ms):
                logger.warning(
                    "%s is from a clock more than an hour ahead: taken for one of now", path
                )
                drop = Drop(drop.selector, now_ms())
            self._report(DropFound(path, drop))
        self._known.add(path)

    def _from_manifest(
        self, objects: Iterable[StoredObject], new: list[StoredObject]
    ) -> list[StoredObject]:
        """Report the packs that the latest good manifest knows; returns the others."""
        manifests = [found for found in objects if sequence_of(found.path) is not None]
        sizes = {found.path: found.nbytes for found in new}
        for found in sorted(manifests, reverse=True):
            try:
                packs = decode_manifest(found.path, self._calls.read(found.path, 0, found.nbytes))
            except (ManifestUnusable, FileNotFoundError) as error:
                logger.warning("the remote tier starts without a manifest: %s", error)
                continue
            still_here = [pack for pack in packs if sizes.get(pack.path) == pack.nbytes]
            for pack in sorted(still_here, key=lambda pack: pack.order):
                self._known.add(pack.path)
                self._report(PackFound(pack))
            return [found for found in new if found.path not in self._known]
        return new

    def _footers(
        self, packs: list[StoredObject]
    ) -> Iterator[tuple[StoredObject, PackContents | None]]:
        """Those that could be read, as they come; None for what is no pack to this program."""
        answers: queue.SimpleQueue[tuple[StoredObject, PackContents | None | Exception]]
        answers = queue.SimpleQueue()

        def read(found: StoredObject) -> None:
            try:
                answers.put((found, self._contents(found)))
            except Exception as error:  # of any store's library: tried again at the next look
                answers.put((found, error))

        for found in packs:
            self._footer_threads.submit(partial(read, found))
        for _ in packs:
            found, contents = self._next(answers)
            if isinstance(contents, Exception):
                if not isinstance(contents, FileNotFoundError):
                    logger.warning("%s is not used for now: %s", found.path, contents)
            else:
                yield found, contents

    def _next(
        self, answers: queue.SimpleQueue[tuple[StoredObject, PackContents | None | Exception]]
    ) -> tuple[StoredObject, PackContents | None | Exception]:
        """RuntimeError when the tier is closed meanwhile."""
        while True:
            try:
                return answers.get(timeout=0.5)
            except queue.Empty:
                if self._closed.is_set():
                    raise RuntimeError("the tier is closed") from None

    def _contents(self, found: StoredObject) -> PackContents | None:
        try:
            return read_footer(self._calls, found)
        except UnknownPackVersion as error:
            logger.warning("%s is left alone: %s", found.path, error)
        except PackDamaged as error:
            logger.warning("%s: %s; its blocks are looked for", found.path, error)
            if found.nbytes <= SCAN_BYTES_MAX:
                pack = self._calls.read(found.path, 0, found.nbytes)
                return scan(pack, written_ms_of(found.path))
        self.unreadable_packs_total += 1
        return None


def read_footer(calls: RemoteCalls, found: StoredObject) -> PackContents:
    """Raises :class:`PackDamaged` or :class:`UnknownPackVersion`."""
    start = max(0, found.nbytes - TAIL_BYTES)
    tail = memoryview(calls.read(found.path, start, found.nbytes - start))
    length = footer_bytes(tail[-TRAILER_BYTES:], found.nbytes)
    if length > len(tail):
        tail = memoryview(calls.read(found.path, found.nbytes - length, length))
    return decode_footer(tail[len(tail) - length :], found.nbytes)
