"""Requests that may have ended an engine: which is sent once more, and which never again.

An engine is lost with many requests aboard, of which one at most has ended it. Whom to blame is
known in two cases. An engine that ended itself has named, with its last words, the requests that
it was at work on. And a request that was a suspect already was *alone* in its first steps there:
P computes one prompt after another anyway, so it costs a hundred bystanders of a crash little
to let their suspects begin one after another at each pair. A request that is blamed alone is
poison. Of several that are blamed, or where nobody is, each is a suspect. All others are
bystanders. (What follows for each: ``RequestWalk``.)
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import time
from asyncio import Future, get_running_loop
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from functools import cached_property
from itertools import islice

import msgspec

from common.ids import Incarnation
from launch.gateway.errors import Poisoned
from launch.gateway.request.parts import Part

REMEMBERED_S = 600.0
"""A fingerprint is suspected, or refused, for so long."""
REMEMBERED_MAX = 4096
"""Fingerprints; then the oldest go."""
COPIED_MAX = 256
"""Of them, for a standby."""
_ASIDE = {"stream", "stream_options", "user", "priority"}
"""Fields that do not change what an engine computes."""


class Guilt(enum.Enum):
    """Of a request in the loss of an engine that it was at."""

    BYSTANDER = enum.auto()
    SUSPECT = enum.auto()
    POISON = enum.auto()


class Fingerprint:
    """Of what a client has asked for: the same when it asks again. Made when first needed, which
    it hardly ever is."""

    def __init__(self, part: Part, tenant: str) -> None:
        self._part = part
        self._tenant = tenant

    @cached_property
    def digest(self) -> bytes:
        body = {name: value for name, value in self._part.body.items() if name not in _ASIDE}
        asked = (self._tenant, self._part.path, body)
        return hashlib.blake2b(msgspec.json.encode(asked, order="sorted"), digest_size=16).digest()


class _Entry(msgspec.Struct):
    until_s: float
    refused: bool


class KeptFingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """As another gateway is told of one."""

    digest: bytes
    left_s: float
    refused: bool


class Fingerprints:
    """Those of suspects and of poison, for a while."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def suspected(self, fingerprint: Fingerprint) -> bool:
        """Whether an engine was lost with such a request; raises ``Poisoned`` if by it."""
        if not self._entries:
            return False
        entry = self._entries.get(fingerprint.digest)
        if entry is None:
            return False
        if entry.until_s < self._clock():
            del self._entries[fingerprint.digest]
            return False
        if entry.refused:
            left_s = entry.until_s - self._clock()
            message = f"Such a request has ended an engine: it is refused for {left_s:.0f} s more."
            raise Poisoned(message, outcome="poison_refused")
        return True

    def note(self, fingerprint: Fingerprint, refused: bool) -> None:
        """One more engine was lost with it, or by it."""
        self._entries.pop(fingerprint.digest, None)
        self._entries[fingerprint.digest] = _Entry(self._clock() + REMEMBERED_S, refused)
        if len(self._entries) > REMEMBERED_MAX:
            self._entries.popitem(last=False)

    def acquit(self, fingerprint: Fingerprint) -> None:
        """It was answered."""
        self._entries.pop(fingerprint.digest, None)

    def copied(self) -> list[KeptFingerprint]:
        """For another gateway: the last ``COPIED_MAX`` of those that still count."""
        now = self._clock()
        newest = islice(reversed(self._entries.items()), COPIED_MAX)
        return [
            KeptFingerprint(digest, entry.until_s - now, entry.refused)
            for digest, entry in newest
            if entry.until_s > now
        ][::-1]

    def mirror(self, kept: list[KeptFingerprint]) -> None:
        """Have the same as another gateway."""
        now = self._clock()
        self._entries = OrderedDict((k.digest, _Entry(now + k.left_s, k.refused)) for k in kept)


class Slot:
    """A suspect's leave to begin, and where it does."""

    def __init__(self, suspects: Suspects, fingerprint: Fingerprint) -> None:
        self.fingerprint = fingerprint
        self.begun = False
        """The engines may have it."""
        self._suspects = suspects
        self._engines: list[str] = []
        self._released = False

    def take(self, engines: Iterable[str]) -> None:
        """It begins at these."""
        for engine in engines:
            self._suspects.beginning[engine] = self
            self._engines.append(engine)

    def release(self) -> None:
        """Its first steps are behind it, or it has ended."""
        if not self._released:
            self._released = True
            for engine in self._engines:
                del self._suspects.beginning[engine]
            self._suspects.released()


class Suspects:
    """Who is at the engines, who begins there alone, and whom the loss of one is blamed on."""

    def __init__(self, pairs: Callable[[], int]) -> None:
        """``pairs`` of a prefill and a decode process that requests can go to."""
        self.fingerprints = Fingerprints()
        self.aboard: dict[str, Fingerprint] = {}
        """By the engines' id of a request that they may have."""
        self.beginning: dict[str, Slot] = {}
        """By engine: of the suspect in its first steps there, or about to take them."""
        self._pairs = pairs
        self._slots_taken = 0
        self._waiting: deque[Future[None]] = deque()
        self._blamed: dict[str, tuple[Incarnation, frozenset[bytes]]] = {}
        """By engine, of its last loss; nobody, or more than one: nobody knows."""

    @property
    def waiting(self) -> int:
        """Suspects that wait for a pair."""
        return len(self._waiting)

    # ---- whom to blame ----------------------------------------------------------------

    def engine_lost(self, engine: str, incarnation: Incarnation, named: Iterable[str]) -> None:
        """``named``: the requests that its last words were about."""
        digests = {self.aboard[rid].digest for rid in named if rid in self.aboard}
        alone = self.beginning.get(engine)
        if alone is not None and alone.begun:
            digest = alone.fingerprint.digest
            digests = {digest} if not digests or digest in digests else digests
        self._blamed[engine] = (incarnation, frozenset(digests))

    def guilt(self, engine: str, incarnation: Incarnation, fingerprint: Fingerprint) -> Guilt:
        """Of a request that was at an engine which was lost."""
        lost, blamed = self._blamed.get(engine, (incarnation, frozenset[bytes]()))
        if lost != incarnation or not blamed:
            return Guilt.SUSPECT
        if fingerprint.digest not in blamed:
            return Guilt.BYSTANDER
        return Guilt.POISON if len(blamed) == 1 else Guilt.SUSPECT

    # ---- alone ------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def alone(self, fingerprint: Fingerprint) -> AsyncIterator[Slot]:
        """Wait until fewer suspects begin than there are pairs."""
        granted: Future[None] = get_running_loop().create_future()
        self._waiting.append(granted)
        self._grant()
        try:
            await granted
        except BaseException:  # cancelled, perhaps at the very moment of the grant
            if granted.done() and not granted.cancelled():
                self.released()
            with contextlib.suppress(ValueError):
                self._waiting.remove(granted)
            raise
        slot = Slot(self, fingerprint)
        try:
            yield slot
        finally:
            slot.release()

    def released(self) -> None:
        """A suspect has begun, or is gone."""
        self._slots_taken -= 1
        self._grant()

    def _grant(self) -> None:
        while self._waiting and self._slots_taken < max(1, self._pairs()):
            granted = self._waiting.popleft()
            if not granted.done():
                self._slots_taken += 1
                granted.set_result(None)
