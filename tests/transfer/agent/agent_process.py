"""A real agent process for tests, and a gateway's end of its control connection."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import zmq

from common.block import BlockKey
from common.ids import PlanId
from common.messages.codec import Message, decode, encode
from common.messages.fields import Ping
from common.messages.from_agents import AgentHello, AgentStatus, Announcement, ShareRead
from common.messages.from_gateway import ReadShare
from common.process_settings import INCARNATION, SECRETS
from common.user_files import write_private
from tests.common.ports import free_port
from tests.control import SECRET, join
from tests.transfer.agent.fake_engine import LAYOUT, ROOT, key_of
from transfer.agent.config import AgentConfig
from transfer.control.senders import GATEWAY

SLOT_BYTES = -(-LAYOUT.block_bytes // 4096) * 4096
M = TypeVar("M", bound=Message)


class AgentProcess:
    """``start`` may be called again after ``kill``: same settings, newer incarnation."""

    def __init__(self, folder: Path, slots: int = 64, **settings: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.control = f"tcp://127.0.0.1:{free_port()}"
        self.log_path = folder / "agent.log"
        fields: dict[str, Any] = {
            "name": "a0",
            "control": self.control,
            "host": "127.0.0.1",
            "protocol": "tcp",
            "dram_bytes": slots * SLOT_BYTES,
            "ssd_dirs": [str(folder / "ssd")],
            "ssd_bytes": 64 << 20,
            "ssd_min_free_bytes": 0,
            "pace": "off",
            "engines": [f"{role}{number}" for role in "pd" for number in range(10)],
            "control_secret": SECRET,
        }
        self.config = AgentConfig(**{**fields, **settings})
        self._incarnation = 100

    def start(self) -> None:
        self._incarnation += 1
        secrets = self.log_path.with_name("secrets")
        write_private(secrets, self.config.secrets())
        environment = {
            **os.environ,
            SECRETS: str(secrets),
            "PYTHONPATH": str(ROOT),
            **self.config.to_env(),
            INCARNATION: str(self._incarnation),
            "MC_TRANSFER_TIMEOUT": "5",
            "MC_TCP_PROGRESS_TIMEOUT_SEC": "1",
            "MC_TCP_STATUS_TIMEOUT_SEC": "1",
        }
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "transfer.agent"], env=environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)

    def stop(self) -> float:
        """SIGTERM; returns the seconds it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(10) == 0, self.log()
        return time.monotonic() - started

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


class FakeGateway:
    """A DEALER that keeps what comes in until someone asks for it."""

    def __init__(self, control: str, name: str = GATEWAY) -> None:
        """``name``: of its key, if it is an engine's."""
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        join(self.socket, control, name, "a0")
        self.received: list[Message] = []

    def send(self, message: Message) -> None:
        self.socket.send(encode(message))

    def wait(
        self, kind: type[M], matches: Callable[[M], bool] = lambda _: True, timeout_s: float = 30
    ) -> M:
        """The first message of a kind for which ``matches`` holds; it is taken out."""
        end = time.monotonic() + timeout_s
        while True:
            for message in self.received:
                if isinstance(message, kind) and matches(message):
                    self.received.remove(message)
                    return message
            left_s = end - time.monotonic()
            if left_s <= 0 or not self.socket.poll(int(left_s * 1000)):
                raise TimeoutError(f"no such {kind.__name__} within {timeout_s} s")
            self.received.append(decode(self.socket.recv()))

    def hello(self) -> AgentHello:
        self.send(Ping())
        return self.wait(AgentHello)

    def status(
        self, matches: Callable[[AgentStatus], bool] = lambda _: True, timeout_s: float = 30
    ) -> AgentStatus:
        """A status from now on."""
        self.received = [m for m in self.received if not isinstance(m, AgentStatus)]
        return self.wait(AgentStatus, matches, timeout_s)

    def read(self, plan: int, blocks: range, deadline_s: float = 30) -> ShareRead:
        """Have blocks read; waits for the answer."""
        self.send(ReadShare(PlanId(plan), [key_of(block) for block in blocks], deadline_s))
        return self.wait(ShareRead, lambda share: share.plan == plan)

    def read_all(self, plan: int, sizes: dict[BlockKey, int], deadline_s: float = 30) -> ShareRead:
        """Have objects of these sizes read; waits for the answer."""
        self.send(ReadShare(PlanId(plan), list(sizes), deadline_s, sizes=list(sizes.values())))
        return self.wait(ShareRead, lambda share: share.plan == plan)

    def holdings(self, wanted: int, tier: str, timeout_s: float = 30) -> set[bytes]:
        """Announced blocks of a tier, once there are ``wanted`` of them."""
        held: set[bytes] = set()
        while len(held) < wanted:
            news = self.wait(Announcement, timeout_s=timeout_s)
            for change in news.changes:
                if change.tier == tier:
                    (held.add if change.held else held.discard)(change.key)
        return held

    def close(self) -> None:
        self._context.destroy(0)


@contextmanager
def running_agent(folder: Path, slots: int = 64, **settings: Any) -> Iterator[AgentProcess]:
    agent = AgentProcess(folder, slots, **settings)
    agent.start()
    try:
        yield agent
    finally:
        agent.kill()
