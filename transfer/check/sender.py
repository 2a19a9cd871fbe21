"""One sender of a probe: a real Mooncake process of one traffic class.

``python -m transfer.check.sender HOST PROTOCOL DEVICES`` answers each command, a line of JSON
on stdin, with a line of JSON on stdout; the first line says that it is ready.
"""

from __future__ import annotations

import sys
import time
from typing import Literal

import msgspec
import numpy as np

from transfer.mooncake import TransferFailed, TransferPeer

STREAM_BYTES_MIN, STREAM_BYTES_MAX = 256 << 10, 16 << 20
WRITE_S = 0.005
"""A write of a stream takes at least so long alone, so that calls cost little beside it."""
MESSAGE_BYTES = 4 << 10
MESSAGE_PERIOD_S = 0.005


class Target(msgspec.Struct, frozen=True):
    """Memory that a serving node gives to probes."""

    session_id: str
    address: int
    nbytes: int


class Phase(msgspec.Struct, frozen=True):
    """What to send, where to, for how long."""

    kind: Literal["stream", "messages"]
    target: Target
    seconds: float


class Sent(msgspec.Struct, frozen=True):
    """Of each write: when it was done (this machine's monotonic clock), how long it took, and
    its bytes. ``error``: why there are no more."""

    at_s: list[float] = []
    took_s: list[float] = []
    nbytes: list[int] = []
    error: str = ""


class Sender:
    def __init__(self, peer: TransferPeer) -> None:
        self._peer = peer
        self._memory = np.ones(STREAM_BYTES_MAX, np.uint8)
        peer.register(int(self._memory.ctypes.data), self._memory.nbytes)
        self._stream_bytes = STREAM_BYTES_MIN

    def send(self, phase: Phase) -> Sent:
        """Write one after the other for so long; a failure ends it."""
        sent = Sent()
        end = time.monotonic() + phase.seconds
        while (began := time.monotonic()) < end:
            nbytes = MESSAGE_BYTES if phase.kind == "messages" else self._stream_bytes
            try:
                self._write(phase.target, min(nbytes, phase.target.nbytes))
            except TransferFailed as error:
                return msgspec.structs.replace(sent, error=str(error))
            now = time.monotonic()
            sent.at_s.append(now)
            sent.took_s.append(now - began)
            sent.nbytes.append(nbytes)
            if phase.kind == "messages":
                time.sleep(max(0.0, began + MESSAGE_PERIOD_S - now))
            elif now - began < WRITE_S:
                self._stream_bytes = min(2 * self._stream_bytes, STREAM_BYTES_MAX)
        return sent

    def _write(self, target: Target, nbytes: int) -> None:
        source = np.array([self._memory.ctypes.data], np.int64)
        destination = np.array([target.address], np.int64)
        self._peer.write(target.session_id, source, destination, np.array([nbytes], np.int64))


def main(host: str, protocol: str, devices: str) -> None:
    """Until stdin ends."""
    sender = Sender(TransferPeer(host, protocol, devices))
    print("ready", flush=True)
    for line in sys.stdin:
        sent = sender.send(msgspec.json.decode(line, type=Phase))
        print(msgspec.json.encode(sent).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
