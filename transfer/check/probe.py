"""Measured proof: both classes at once, from this node into another one's memory.

The other node serves some memory (:func:`serve`). Three processes write to it: an engine's
stream and its small messages in the high class, an agent's stream in the low one, each
alone and then side by side.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Literal, NoReturn

import msgspec
import numpy as np
import zmq

from transfer.check.findings import Finding, State
from transfer.check.sender import Phase, Sent, Target
from transfer.mooncake import TransferPeer, host_of
from transfer.traffic import cgroup
from transfer.traffic.classes import BadMarks, TrafficSettings, rdma_env

PORT = 30990
TARGET_BYTES = 16 << 20
ASK_TIMEOUT_MS = 5000
START_TIMEOUT_S = 30.0
PHASE_EXTRA_S = 30.0
"""For a phase to end after its time: a write of the low class may take long at its end."""
LEAD_S = 0.3
"""The low class begins so long before the high one, and ends so long after it."""
KEPT_MIN = 0.9
"""Of the high class's throughput, where classes take effect."""
FULL_MIN, FULL_MAX = 0.8, 1.25
"""Of the rate alone, for both together: outside, the link was not what limited them."""


class ProbeFailed(Exception):
    """It could not be measured; the message says why."""


class Node(msgspec.Struct, frozen=True):
    """This machine, as Mooncake is to use it (:class:`transfer.mooncake.TransferPeer`)."""

    host: str
    protocol: str
    devices: str


class Measured(msgspec.Struct, frozen=True):
    """Rates of payload; latencies of one-sided writes of 4 KiB."""

    is_one_machine: bool
    high_alone_mbit: float
    low_alone_mbit: float
    high_beside_mbit: float
    low_beside_mbit: float
    message_alone_p99_ms: float
    message_beside_p99_ms: float

    @property
    def high_kept(self) -> float:
        return self.high_beside_mbit / max(self.high_alone_mbit, 1e-9)

    @property
    def link_used(self) -> float:
        """Both together, of what one of them gets alone."""
        alone = max(self.high_alone_mbit, self.low_alone_mbit, 1e-9)
        return (self.high_beside_mbit + self.low_beside_mbit) / alone


# ---- the other node ---------------------------------------------------------------------------


def serve(node: Node, port: int, ready: Callable[[str], None]) -> NoReturn:
    """Give memory to probes, until interrupted. Raises :class:`ProbeFailed`."""
    context = zmq.Context()
    control = context.socket(zmq.REP)
    try:
        control.bind(f"tcp://{node.host}:{port}")
    except zmq.ZMQError as error:
        context.destroy(0)
        raise ProbeFailed(f"cannot serve at {node.host}:{port}: {error}") from error
    peer = TransferPeer(node.host, node.protocol, node.devices)
    memory = np.zeros(TARGET_BYTES, np.uint8)
    peer.register(int(memory.ctypes.data), memory.nbytes)
    target = Target(peer.session_id, int(memory.ctypes.data), memory.nbytes)
    ready(f"{node.host}:{port}")
    try:
        while True:
            control.recv()
            control.send(msgspec.json.encode(target))
    finally:
        context.destroy(0)


def ask_target(host: str, port: int) -> Target:
    """What a serving node offers. Raises :class:`ProbeFailed`."""
    context = zmq.Context()
    control = context.socket(zmq.REQ)
    control.setsockopt(zmq.LINGER, 0)
    control.connect(f"tcp://{host}:{port}")
    try:
        control.send(b"target")
        if not control.poll(ASK_TIMEOUT_MS):
            raise ProbeFailed(
                f"{host}:{port} does not answer: start `python -m transfer.check --serve --host "
                f"{host}` there, and let its ports through"
            )
        return msgspec.json.decode(control.recv(), type=Target)
    except msgspec.DecodeError as error:
        raise ProbeFailed(f"{host}:{port} answers, but not as a probe's peer: {error}") from error
    finally:
        context.destroy(0)


def own_address(peer: str) -> str:
    """The address from which this node reaches the peer. Raises :class:`ProbeFailed`."""
    try:
        family = socket.getaddrinfo(peer, PORT, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, PORT))  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ProbeFailed(f"no way to {peer}: {error}") from error


# ---- this node --------------------------------------------------------------------------------


class _Process:
    """A sender of one class. Has one phase at a time."""

    def __init__(self, kind: str, node: Node, settings: TrafficSettings) -> None:
        self._kind = kind
        try:
            marks = rdma_env(kind, settings) if node.protocol == "rdma" else {}
        except BadMarks as error:
            raise ProbeFailed(str(error)) from error
        name = settings.cgroup if kind == "agent" else ""
        with cgroup.entry(name) as group:

            def prepare() -> None:
                if group is not None:
                    cgroup.join(group)

            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "transfer.check.sender",
                    node.host,
                    node.protocol,
                    node.devices,
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **marks},
                preexec_fn=prepare,
                text=True,
            )

    def wait_ready(self) -> None:
        if self._line(START_TIMEOUT_S).strip() != "ready":
            raise ProbeFailed(f"the {self._kind}'s sender cannot start: is Mooncake installed?")

    def begin(self, phase: Phase) -> None:
        assert self._process.stdin is not None
        print(msgspec.json.encode(phase).decode(), file=self._process.stdin, flush=True)

    def end(self, seconds: float) -> Sent:
        sent = msgspec.json.decode(self._line(seconds + PHASE_EXTRA_S) or "{}", type=Sent)
        if sent.error or not sent.at_s:
            raise ProbeFailed(f"the {self._kind}'s sender: {sent.error or 'nothing was sent'}")
        return sent

    def _line(self, timeout_s: float) -> str:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], timeout_s)[0]:
            raise ProbeFailed(f"the {self._kind}'s sender does not answer within {timeout_s:g} s")
        return stdout.readline()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def _senders(node: Node, settings: TrafficSettings) -> Iterator[tuple[_Process, _Process]]:
    started: list[_Process] = []
    try:
        for kind in ("engine", "agent"):
            started.append(_Process(kind, node, settings))
        for process in started:
            process.wait_ready()
        yield started[0], started[1]
    finally:
        for process in started:
            process.close()


def measure(
    target: Target,
    node: Node,
    settings: TrafficSettings,
    seconds: float,
    progress: Callable[[str], None],
) -> Measured:
    """From this node, each part for so many seconds. Raises :class:`ProbeFailed`."""
    with _senders(node, settings) as (high, low):

        def alone(sender: _Process, kind: Literal["stream", "messages"]) -> Sent:
            sender.begin(Phase(kind, target, seconds))
            return sender.end(seconds)

        def beside(kind: Literal["stream", "messages"]) -> tuple[Sent, Sent]:
            long = seconds + 2 * LEAD_S
            low.begin(Phase("stream", target, long))
            time.sleep(LEAD_S)
            high.begin(Phase(kind, target, seconds))
            return high.end(seconds), low.end(long)

        progress("the high class alone")
        high_alone = alone(high, "stream")
        progress("small messages alone")
        messages_alone = alone(high, "messages")
        progress("the low class alone")
        low_alone = alone(low, "stream")
        progress("both classes at once")
        high_beside, low_beside = beside("stream")
        progress("small messages beside the low class")
        messages_beside, _ = beside("messages")
    during = high_beside.at_s[0] - high_beside.took_s[0], high_beside.at_s[-1]
    return Measured(
        is_one_machine=host_of(target.session_id) == node.host,
        high_alone_mbit=_rate_mbit(high_alone),
        low_alone_mbit=_rate_mbit(low_alone),
        high_beside_mbit=_rate_mbit(high_beside),
        low_beside_mbit=_rate_mbit(low_beside, during),
        message_alone_p99_ms=_p99_ms(messages_alone),
        message_beside_p99_ms=_p99_ms(messages_beside),
    )


def _rate_mbit(sent: Sent, during: tuple[float, float] | None = None) -> float:
    """Of payload; a write that overlaps an end of the period counts by its part in it."""
    ends, nbytes = np.array(sent.at_s), np.array(sent.nbytes, float)
    starts = ends - np.array(sent.took_s)
    first, last = during or (float(starts[0]), float(ends[-1]))
    inside = np.clip(np.minimum(ends, last) - np.maximum(starts, first), 0.0, None)
    return float((nbytes * inside / (ends - starts)).sum() / (last - first) * 8 / 1e6)


def _p99_ms(sent: Sent) -> float:
    return float(np.quantile(sent.took_s, 0.99) * 1e3)


def judge(measured: Measured) -> Finding:
    """What the numbers say."""
    kept = (
        f"high keeps {measured.high_kept:.0%} of its {measured.high_alone_mbit:.0f} Mbit/s beside "
        f"low, which gets {measured.low_beside_mbit:.0f}; p99 of small messages "
        f"{measured.message_alone_p99_ms:.1f} ms alone, {measured.message_beside_p99_ms:.1f} beside"
    )
    if measured.is_one_machine:
        return Finding(
            State.UNPROVEN,
            f"measured on one machine: {kept}",
            "No link was crossed: the CPU decided",
        )
    if not FULL_MIN <= measured.link_used <= FULL_MAX:
        return Finding(
            State.UNPROVEN,
            f"measured: {kept}",
            f"Both together move {measured.link_used:.0%} of what one does alone: something other "
            "than the link limits them here, so classes had nothing to decide",
        )
    if measured.high_kept >= KEPT_MIN:
        return Finding(State.EFFECT, f"measured, the classes take effect: {kept}")
    return Finding(
        State.NONE,
        f"measured, the classes do not take effect: {kept}",
        f"Model traffic loses {1 - measured.high_kept:.0%} of the link to KV movement",
    )
