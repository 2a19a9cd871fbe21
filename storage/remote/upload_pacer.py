"""Uploads yield to reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

UPLOAD_SHARE = 0.05
"""While reads wait, uploads get so much of what the reads get."""
WAIT_S_MAX = 5.0
"""An upload goes on after that, so that a store that answers no read still gets it."""


class UploadPacer:
    """While reads are outstanding, an upload of n bytes waits until the reads have got
    n / ``UPLOAD_SHARE``. Without reads nothing waits. For any thread."""

    def __init__(self, share: float = UPLOAD_SHARE, wait_s_max: float = WAIT_S_MAX) -> None:
        self._share = share
        self._wait_s_max = wait_s_max
        self._changed = threading.Condition()
        self._outstanding_bytes = 0
        self._credit_bytes = 0.0

    def read_begins(self, nbytes: int) -> None:
        with self._changed:
            self._outstanding_bytes += nbytes

    def read_ends(self, nbytes: int) -> None:
        with self._changed:
            self._outstanding_bytes -= nbytes
            self._credit_bytes += self._share * nbytes
            self._changed.notify_all()

    @contextmanager
    def reading(self, nbytes: int) -> Iterator[None]:
        """Around a read."""
        self.read_begins(nbytes)
        try:
            yield
        finally:
            self.read_ends(nbytes)

    def wait_turn(self, nbytes: int) -> None:
        """Returns when so many bytes may be sent."""
        end = time.monotonic() + self._wait_s_max
        with self._changed:
            while self._outstanding_bytes and self._credit_bytes < nbytes:
                if not self._changed.wait(max(0.0, end - time.monotonic())):
                    break
            # what reads got before does not count for a later burst
            self._credit_bytes = max(0.0, min(self._credit_bytes, nbytes) - nbytes)
