"""An engine without SGLang, as a process: KV buffers, a completion board, links to agents.

``python fake_engine.py CONFIG`` reads commands and writes answers and agents' messages, one
JSON object a line. ``FakeEngine`` is the test's end of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from common.block import BlockKey, BlockLayout, Namespace, Part
from common.ids import Incarnation
from common.messages.codec import Message, decode, encode
from common.messages.from_agents import Fenced, JobEnded, PullEnded
from common.messages.from_engines import RankMemory, RegisterEngine
from tests.control import keys

ROOT = Path(__file__).resolve().parents[3]
LAYOUT = BlockLayout(page_tokens=4, num_layers=4, component_bytes=(4096, 2048))
BOARD_WORDS = 64
PAGES = 64
"""Of its KV memory."""


class WithParts(NamedTuple):
    """A layout of blocks, and parts beside them."""

    layout: BlockLayout
    parts: Sequence[Part]


def namespace(layout: BlockLayout = LAYOUT, parts: Sequence[Part] = ()) -> Namespace:
    return Namespace("model", "1", "float32", layout, parts=tuple(parts))


def key_of(number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(f"block {number}".encode()).digest())


def content_of(number: int, layout: BlockLayout = LAYOUT, part: str = "block") -> bytes:
    """The bytes of block ``number``, or of its object of a part, layer-major as blocks are."""
    return hashlib.shake_128(f"{part} {number}".encode()).digest(layout.block_bytes)


# ---- the test's end -----------------------------------------------------------------------


class FakeEngine:
    """Handle of the process. ``wait_alive`` is called before the first job."""

    HAS_JOBS = False

    def __init__(
        self,
        name: str,
        agents: dict[str, str],
        incarnation: int = 1,
        layout: BlockLayout | WithParts = LAYOUT,
        ranks: int = 1,
        host: str = "127.0.0.1",
    ) -> None:
        """``layout.shards`` is how many parts the ``ranks`` split a block into."""
        layout, parts = layout if isinstance(layout, WithParts) else WithParts(layout, ())
        fields, part_fields = msgspec.to_builtins(layout), msgspec.to_builtins(parts)
        config = json.dumps(
            [name, agents, incarnation, fields, ranks, host, self.HAS_JOBS, part_fields]
        )
        self.layout = layout
        self.parts = parts
        self.process = subprocess.Popen(
            [sys.executable, __file__, config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            text=True,
        )
        self.messages: list[tuple[float, Message]] = []
        self._answers: queue.Queue[Any] = queue.Queue()
        self._changed = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()
        self.board_address: int = self._answers.get(timeout=60)
        """Of the first rank."""

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            record = json.loads(line)
            if "message" not in record:
                self._answers.put(record["answer"])
                continue
            with self._changed:
                message = decode(base64.b64decode(record["message"]))
                self.messages.append((time.monotonic(), message))
                self._changed.notify_all()

    def _ask(self, *command: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answers.get(timeout=60)

    def wait_alive(self, agent: str, incarnation: int = 0, timeout_s: float = 30) -> int:
        """Until this agent, of at least this incarnation, has answered; returns it."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            answered = self._ask("incarnation", agent)
            if answered is not None and answered > incarnation:
                time.sleep(0.1)  # the registration is on its way
                return answered
            time.sleep(0.02)
        raise TimeoutError(f"agent {agent} did not answer")

    def send(self, agent: str, message: Message) -> None:
        assert self._ask("send", agent, base64.b64encode(encode(message)).decode())

    def fill(self, page: int, block: int) -> None:
        """Put block ``block`` into a page."""
        content = base64.b64encode(content_of(block, self.layout)).decode()
        self._ask("fill", page, content, 0)

    def fill_all(self, pages: range, first_block: int) -> None:
        for page in pages:
            self.fill(page, first_block + page - pages.start)

    def fill_part(self, part: int, place: int, block: int) -> None:
        """Put a block's object of a part into a place of the part's pool."""
        content = content_of(block, self.parts[part].layout, self.parts[part].name)
        self._ask("fill", place, base64.b64encode(content).decode(), 1 + part)

    def page_bytes(self, page: int, rank: int = 0, pool: int = 0) -> bytes:
        """A page's bytes at one rank: a block's shard. ``pool``: 1 + the number of a part."""
        return base64.b64decode(self._ask("page", page, rank, pool))

    def board(self, slot: int, rank: int = 0) -> tuple[int, int]:
        """(job, code) of a completion word."""
        word = self._ask("board", slot, rank)
        return word >> 16, word & 0xFFFF

    def wait_end(self, job: int, timeout_s: float = 30) -> JobEnded | PullEnded:
        """The agent's word that a job is over."""

        def ended() -> JobEnded | PullEnded | None:
            for _, message in self.messages:
                if isinstance(message, JobEnded | PullEnded) and message.job == job:
                    return message
            return None

        with self._changed:
            assert self._changed.wait_for(ended, timeout_s), f"job {job} did not end"
            found = ended()
            assert found is not None
            return found

    def has_ended(self, job: int) -> bool:
        return any(getattr(message, "job", None) == job for _, message in self.messages)

    @property
    def session_id(self) -> str:
        return self._ask("session")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(5)


class EngineWithJobs(FakeEngine):
    """It has the real engine's jobs and fences."""

    HAS_JOBS = True

    def open_job(self, agent: str, pages: Iterable[int]) -> int:
        """A job of the engine's own, which holds the pages until it is over; its number."""
        return self._ask("open", agent, list(pages))

    def held_pages(self) -> list[int]:
        """Those that such jobs hold."""
        return self._ask("held")

    def wait_over(self, timeout_s: float = 30) -> None:
        """Until no page is held any more."""
        end = time.monotonic() + timeout_s
        while self.held_pages():
            assert time.monotonic() < end, f"held after {timeout_s} s: {self.held_pages()}"
            time.sleep(0.02)


# ---- the process --------------------------------------------------------------------------


class _NoTransfers:
    """The test sees to them."""

    def follow(self, links: Any) -> None:
        return

    def heard(self, agent: str, message: Message) -> None:
        return

    def restarted(self, agent: str, incarnation: Incarnation) -> None:
        return


class _Transfers:
    """The engine's own jobs, holds and fences, as its runtime puts them together."""

    def __init__(self, incarnation: int, data_ports: list[int]) -> None:
        from engine.transfers.fence import Fences, RankConnections
        from engine.transfers.jobs import Jobs
        from engine.transfers.page_holds import PageHolds

        no_allocator: Any = None
        self.holds = PageHolds(no_allocator)
        self.jobs = Jobs(Incarnation(incarnation), self.holds)
        self.restarted = self.jobs.agent_restarted
        self._fences = Fences
        self._ranks = [RankConnections(port) for port in data_ports]

    def follow(self, links: Any) -> None:
        self._links = links
        self.fences = self._fences(self.jobs, links, self._at_ranks)
        threading.Thread(target=self._look, daemon=True).start()

    def open(self, agent: str, pages: list[int]) -> int:
        return self.jobs.open(
            agent, self._links.incarnation(agent), pages, 5.0, lambda reason: None
        )

    def _at_ranks(self, event: Any) -> None:
        from engine.ranks.group import FindConnections

        if isinstance(event, FindConnections):
            self.fences.found(event, [rank.find(event.hosts, event.live) for rank in self._ranks])
        else:
            looked = zip(self._ranks, event.late, strict=True)
            self.fences.were_cut(event, [rank.cut(late) for rank, late in looked])

    def _look(self) -> None:
        while True:
            self.fences.look()
            time.sleep(0.05)

    def heard(self, agent: str, message: Message) -> None:
        if isinstance(message, Fenced):
            self.fences.answered(agent, message)
        elif isinstance(message, JobEnded):
            end = self.jobs.stopped_writing if message.may_land else self.jobs.over
            end(message.job, message.error)


def _say(record: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


class _Pool:
    """One rank's memory; ``layout`` is that of a shard."""

    def __init__(self, layout: BlockLayout) -> None:
        self.layout = layout
        self.buffers = [
            [np.zeros((PAGES if nbytes else 0, nbytes), np.uint8) for nbytes in layout.sizes(layer)]
            for layer in range(layout.num_layers)
        ]
        self.board = np.zeros(BOARD_WORDS, np.uint64)

    def fill(self, page: int, content: bytes) -> None:
        offset = 0
        for layer in self.buffers:
            for buffer in filter(len, layer):
                part = content[offset : offset + buffer.shape[1]]
                buffer[page] = np.frombuffer(part, np.uint8)
                offset += buffer.shape[1]

    def addresses(self) -> list[list[int]]:
        return [
            [int(buffer.ctypes.data) if len(buffer) else 0 for buffer in layer]
            for layer in self.buffers
        ]

    def page(self, page: int) -> bytes:
        buffers = filter(len, chain(*self.buffers))
        return b"".join(buffer[page].tobytes() for buffer in buffers)


def _registered(peer: Any, pools: list[list[_Pool]]) -> list[RankMemory]:
    """Each rank's memory, as its peers may use it."""
    from transfer.connections import data_port

    memories = []
    for kv, *others in pools:
        for pool in (kv, *others):
            arrays: Iterable[np.ndarray] = chain([pool.board], *pool.buffers)
            for array in filter(len, arrays):
                peer.register(int(array.ctypes.data), array.nbytes)
        memory = RankMemory(
            peer.session_id,
            kv.addresses(),
            int(kv.board.ctypes.data),
            data_port(peer.session_id),
            [pool.addresses() for pool in others],
        )
        memories.append(memory)
    return memories


def main() -> None:
    from transfer.client import AgentLinks
    from transfer.mooncake import TransferPeer

    name, agents, incarnation, fields, ranks, host, has_jobs, part_fields = json.loads(sys.argv[1])
    layout = msgspec.convert(fields, BlockLayout)
    parts = msgspec.convert(part_fields, list[Part])
    shards = [
        msgspec.structs.replace(each, shards=layout.shards).shard
        for each in (layout, *(part.layout for part in parts))
    ]
    pools = [[_Pool(shard) for shard in shards] for _ in range(ranks)]
    peer = TransferPeer(host, "tcp")
    memories = _registered(peer, pools)
    hello = RegisterEngine(
        name,
        incarnation,
        namespace(msgspec.structs.replace(layout, shards=1), parts),
        layout.shards,
        memories,
        PAGES,
        BOARD_WORDS,
        [PAGES] * len(parts),
    )

    own: Any = _NoTransfers()
    if has_jobs:
        own = _Transfers(incarnation, [memory.data_port for memory in memories])

    def on_message(agent: str, message: Message) -> None:
        own.heard(agent, message)
        _say({"message": base64.b64encode(encode(message)).decode()})

    links = AgentLinks(agents, keys(name), hello, on_message, own.restarted)
    own.follow(links)
    _say({"answer": memories[0].board_address})
    answer: Any
    for line in sys.stdin:
        match json.loads(line):
            case ["incarnation", agent]:
                answer = links.incarnation(agent) if links.alive(agent) else None
            case ["send", agent, frame]:
                answer = links.send(agent, decode(base64.b64decode(frame)))
            case ["open", agent, pages]:
                answer = own.open(agent, pages)
            case ["held"]:
                answer = sorted(own.holds.held_pages())
            case ["fill", page, content, number]:
                answer = None
                whole_block, nbytes = base64.b64decode(content), shards[number].block_bytes
                for rank, of_rank in enumerate(pools):
                    start = rank * layout.shards // ranks * nbytes
                    of_rank[number].fill(page, whole_block[start : start + nbytes])
            case ["page", page, rank, number]:
                answer = base64.b64encode(pools[rank][number].page(page)).decode()
            case ["session"]:
                answer = peer.session_id
            case ["board", slot, rank]:
                answer = int(pools[rank][0].board[slot])
        _say({"answer": answer})


if __name__ == "__main__":
    main()
