"""An engine's own parts, real, between an SGLang and agents that are made up."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
import torch

from common.block import BlockKey, BlockLayout, Namespace, Part, block_keys
from common.board_word import board_word
from common.ids import BoardSlot, Incarnation, PlanId
from common.messages.codec import Message
from common.messages.from_engines import Deliver, RegisterEngine
from common.messages.from_gateway import EnginePlan
from common.page_hashes import page_hashes
from engine.config import EngineConfig
from engine.decode.persist import Persister
from engine.page_table import PageTable, Window
from engine.plans import Plans
from engine.ranks.group import CutConnections, FindConnections
from engine.sglang import pool_hooks
from engine.streams import Streams
from engine.transfers.completion_board import CompletionBoard
from engine.transfers.deliveries import Deliveries
from engine.transfers.fence import Fences, RankConnections
from engine.transfers.jobs import Jobs
from engine.transfers.page_holds import PageHolds
from engine.transfers.snapshots import Snapshots
from engine.weights import Weights

T = TypeVar("T")
PAGE = 4
LAYERS = 3
DATA_PORT = 1
"""Nobody connects to it."""
NAMESPACE = Namespace("model", "1", "float32", BlockLayout(PAGE, LAYERS, (8, 8)))
WINDOW = Part("window", BlockLayout(PAGE, LAYERS, (8, 8), absent=((1,), (1,))), span_pages=2)
WITH_WINDOWS = Namespace(
    "model",
    "1",
    "float32",
    BlockLayout(PAGE, LAYERS, (8, 8), absent=((0, 2), (0, 2))),
    parts=(WINDOW,),
)
"""Tokens of layers 0 and 2 attend to the last two pages alone."""
UNDER_A_DRAFT = msgspec.structs.replace(
    NAMESPACE, layout=msgspec.structs.replace(NAMESPACE.layout, draft_layers=1)
)
EARLIER_WEIGHTS = b"e" * 32


@dataclass
class Kv:
    """SGLang's ReqKvInfo."""

    req_pool_idx: int = 0
    cache_protected_len: int = 0


@dataclass
class _Request:
    """SGLang's Req, as far as it is looked at."""

    rid: str
    origin_input_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    extra_key: str | None = None
    cache_salt: str | None = None
    kv: Kv = field(default_factory=Kv)
    prefix_len: int = 0
    finished_reason: object | None = None

    def finished(self) -> bool:
        return self.finished_reason is not None


Request: Any = _Request
"""Untyped, as SGLang's own is."""


class Allocator:
    """SGLang's list of free pages; page 0 is its padding."""

    page_size = PAGE

    def __init__(self, pages: int) -> None:
        self.free_pages = torch.arange(1, pages + 1)
        self.num_staged_pages = 0

    def alloc(self, tokens: int) -> torch.Tensor | None:
        pages = self.free_pages[: tokens // PAGE]
        if len(pages) * PAGE < tokens:
            return None
        self.free_pages = self.free_pages[len(pages) :]
        return (pages[:, None] * PAGE + torch.arange(PAGE)).reshape(-1)


class Links:
    """Keeps what is sent, in order; reaches every agent or, once told so, none."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []
        self.reachable = True
        self.hosts: dict[str, str] = {}

    def incarnation(self, agent: str) -> Incarnation | None:
        return Incarnation(5)

    def host(self, agent: str) -> str:
        return self.hosts.get(agent, "")

    def send(self, agent: str, message: Message) -> bool:
        if self.reachable:
            self.sent.append((agent, message))
        return self.reachable

    def set_hello(self, hello: RegisterEngine) -> None:
        self.sent.append(("every agent", hello))

    def of(self, kind: type[T]) -> list[tuple[str, T]]:
        return [(agent, message) for agent, message in self.sent if isinstance(message, kind)]


class Parts:
    """The parts of one engine of one rank, and what its agents do."""

    def __init__(
        self,
        role: str = "decode",
        pages: int = 64,
        streams: Streams | None = None,
        namespace: Namespace = NAMESPACE,
        **settings: Any,
    ) -> None:
        self.config = EngineConfig(
            name="e0", role=role, controls=[], agent="own", agents={}, **settings
        )
        self.weights = Weights(namespace, "e0")
        self.plans = Plans(self.weights, PAGE)
        self.allocator = cast(Any, Allocator(pages))
        self.windows = cast(Any, Allocator(pages)) if namespace.parts else None
        of_parts = [PageHolds(self.windows)] if namespace.parts else []
        self.holds = PageHolds(self.allocator, of_parts)
        self.jobs = Jobs(Incarnation(1), self.holds)
        self.board = CompletionBoard(8, lambda address, length: None)
        self.links = Links()
        self.jobs.host_of = self.links.host
        self.cuts: list[CutConnections] = []
        self.fences = self.fences_of(DATA_PORT)
        self.deliveries = Deliveries(
            self.config,
            self.board,
            self.jobs,
            self.links,
            LAYERS,
            tell_failure=lambda slot, job: None,
        )
        self.streams = streams or Streams()
        self.rows = torch.zeros((4, 256), dtype=torch.int64)
        self.window: Window | None = None
        if namespace.parts:
            rows = torch.zeros(PAGE * (pages + 1), dtype=torch.int64)
            self.window = Window(rows, tokens=2 * PAGE - 1)
        self.table = PageTable(self.rows, PAGE, self.streams, self.window)
        self.persister = Persister(self.config, self.table, self.jobs, self.links, self.plans)
        self.snapshots: Snapshots | None = None

    def fences_of(self, data_port: int) -> Fences:
        """Which cut nothing: it is noted instead."""
        here = RankConnections(data_port)

        def post(event: FindConnections | CutConnections) -> None:
            if isinstance(event, FindConnections):
                fences.found(event, [here.find(event.hosts, event.live)])
            else:
                self.cuts.append(event)
                fences.were_cut(event, [True])

        fences = Fences(self.jobs, self.links, post)
        return fences

    # ---- the gateway ----

    def plan(
        self,
        request: Any,
        blocks: int,
        readers: tuple[str, ...] = ("a",),
        keys: list[BlockKey] | None = None,
        namespace_digest: bytes | None = None,
        deadline_s: float = 60.0,
    ) -> EnginePlan:
        """Announce that the request's first blocks are with the readers, in turns."""
        namespace_digest = namespace_digest or self.weights.digest
        if keys is None:
            hashes = hashes_of(request, self.weights.namespace.layout.bigrams)
            keys = block_keys(namespace_digest, hashes)[:blocks]
        reader = [block % len(readers) for block in range(len(keys))]
        plan = EnginePlan(
            PlanId(7), request.rid, namespace_digest, keys, list(readers), reader, deadline_s
        )
        self.plans.put(plan)
        return plan

    # ---- the agents ----

    def jobs_sent(self) -> list[tuple[str, Deliver]]:
        return self.links.of(Deliver)

    def write(self, job: Deliver, layers: int) -> None:
        """An agent's word that so many layers are here (or FAILED)."""
        word = np.uint64(board_word(job.job, layers)).tobytes()
        ctypes.memmove(self.board.address(BoardSlot(job.board_slot)), word, len(word))


def hashes_of(request: Any, bigrams: bool = False) -> list[bytes]:
    """Page hashes of the prompt."""
    prompt = request.origin_input_ids
    return page_hashes(prompt, PAGE, request.extra_key, request.cache_salt, bigrams)


def keys_of(request: Any, namespace_digest: bytes) -> list[BlockKey]:
    return block_keys(namespace_digest, hashes_of(request))


def hooked_allocator() -> Any:
    """SGLang's class of allocators, hooked as in an engine."""
    from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

    class Hooked(PagedTokenToKVPoolAllocator):
        def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
            pool_hooks.around_release(super()._release_page_ids.__func__, self, *page_ids)

        def available_size(self) -> int:
            pool_hooks.before_available_size(self)
            return super().available_size()

        def clear(self) -> None:
            super().clear()
            pool_hooks.after_clear(None, self)

    return Hooked
