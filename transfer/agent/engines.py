"""The engines that an agent serves: who they are now, and what is open with each."""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Sequence, Set

import msgspec
import numpy as np

from common.block import BlockLayout, label_of
from common.board_word import FAILED
from common.ids import BoardSlot, JobId
from common.messages import INT64_MAX, JobEnded, PullEnded, RankMemory, RegisterEngine
from transfer.agent.jobs.job import Job
from transfer.credits import WORDS, CreditBoard, CreditWord, credit_tag
from transfer.mooncake import host_of

JOBS_REMEMBERED = 65536
UNSENT_MAX = 4096
AHEAD_MAX_MS = 86_400_000
"""How far an engine's clock may be ahead of ours: a day. A number from farther on would keep every
later start of the engine out."""
LAYERS_MAX = FAILED - 1
"""That a completion word can count."""
COMPONENTS_MAX = 16
PAGE_TOKENS_MAX = 1 << 16
_SESSION = re.compile(r"\S+:\d{1,5}")


class BadRegistration(Exception):
    """What an engine says of itself cannot be."""


class BadJob(Exception):
    """A job names what the engine has not registered, or not a page for each block."""


class Rank(msgspec.Struct, frozen=True, eq=False):
    """One rank of an engine."""

    session_id: str
    kv_addresses: np.ndarray
    """Shape (layers, components), int64."""
    board_address: int
    shard: int
    """The part of each block that it holds."""
    credit: CreditWord
    """How far its layer window may be written, if it has one."""
    data_port: int
    """Where it takes TCP connections; 0: it takes none."""

    @property
    def host(self) -> str:
        """Address that it has given to Mooncake."""
        return host_of(self.session_id)


class Engine:
    """One incarnation of an engine."""

    def __init__(self, identity: bytes, message: RegisterEngine, credits: CreditBoard) -> None:
        """Raises :class:`BadRegistration`."""
        _layout(message)
        self._credits = credits.take(len(message.ranks), credit_tag(message.incarnation))
        self.name = message.engine
        self.incarnation = message.incarnation
        self.is_gone = False
        """A newer incarnation has replaced it."""
        self.jobs: dict[JobId, Job] = {}
        """Deliveries and pulls in a queue, by job number."""
        self.unsent: deque[JobEnded | PullEnded] = deque(maxlen=UNSENT_MAX)
        """Ends of jobs that found no connection: sent when it registers again."""
        self.failures = 0
        """Jobs of which bytes may be under way."""
        self.fenced_failures = 0
        """Those of them of which none is any more (:mod:`transfer.agent.fences`)."""
        self._seen_jobs: OrderedDict[JobId, None] = OrderedDict()
        self.update(identity, message)

    def update(self, identity: bytes, message: RegisterEngine) -> None:
        """The same process says it again: it has reconnected, or its weights have changed."""
        if len(message.ranks) != len(self._credits):
            raise BadRegistration(f"engine {message.engine}: other ranks than before")
        layout = _layout(message)
        ranks = [_rank(message, index, word) for index, word in enumerate(self._credits)]
        self.identity, self.layout, self.ranks = identity, layout, ranks
        self._pages, self._board_slots = message.pages, message.board_slots
        self.label = msgspec.structs.replace(label_of(message.namespace), layout=layout)

    def page_array(self, pages: Sequence[int], blocks: int) -> np.ndarray:
        """A job's pages, one for each block; shape (blocks,), int64. Raises :class:`BadJob`."""
        if len(pages) != blocks or not all(0 <= page < self._pages for page in pages):
            raise BadJob(
                f"{len(pages)} pages ({min(pages, default=0)} to {max(pages, default=0)}) for "
                f"{blocks} blocks, of {self._pages} pages"
            )
        return np.array(pages, np.int64)

    def has_board_slot(self, slot: BoardSlot) -> bool:
        """Whether there is such a word on the board of each rank."""
        return 0 <= slot < self._board_slots

    def first_time(self, job: JobId) -> bool:
        """False if this job number was seen before."""
        if job in self._seen_jobs:
            return False
        self._seen_jobs[job] = None
        if len(self._seen_jobs) > JOBS_REMEMBERED:
            self._seen_jobs.popitem(last=False)
        return True

    def cancel_jobs(self) -> None:
        """Stop everything that is queued or under way."""
        for job in list(self.jobs.values()):
            job.cancel()


class Engines:
    """All registered engines, by name and by the identity of their connection."""

    def __init__(self, credits: CreditBoard) -> None:
        self._credits = credits
        self._by_name: dict[str, Engine] = {}
        self._by_identity: dict[bytes, Engine] = {}

    def find(self, identity: bytes) -> Engine | None:
        return self._by_identity.get(identity)

    @property
    def landing_jobs(self) -> int:
        """Those that have failed since the last fence."""
        return sum(each.failures - each.fenced_failures for each in self._by_name.values())

    def keep(self, names: Set[str]) -> None:
        """Forget all others, which have left the cluster, with their jobs."""
        for gone in [engine for name, engine in self._by_name.items() if name not in names]:
            gone.is_gone = True
            gone.cancel_jobs()
            del self._by_name[gone.name]
            self._by_identity.pop(gone.identity, None)

    def can_take(self, layout: BlockLayout) -> bool:
        """Whether blocks of this layout can be delivered into every engine."""
        return all(layout.can_serve(e.layout.shards) for e in self._by_name.values())

    def register(
        self, identity: bytes, message: RegisterEngine
    ) -> tuple[Engine | None, Engine | None]:
        """Note an engine; returns (the engine, the incarnation that it has replaced).

        The engine is None if a newer incarnation is known already. Raises
        :class:`BadRegistration`.
        """
        known = self._by_name.get(message.engine)
        if known is not None and message.incarnation < known.incarnation:
            return None, None
        before = known.identity if known is not None else identity
        replaced = None
        if known is None or message.incarnation > known.incarnation:
            known, replaced = Engine(identity, message, self._credits), known
        else:
            known.update(identity, message)
        self._by_identity.pop(before, None)
        self._by_name[known.name] = self._by_identity[identity] = known
        if replaced is not None:
            replaced.is_gone = True
        return known, replaced


def check_registration(message: RegisterEngine, now_ms: float, memory_bytes: int) -> None:
    """Raises :class:`BadRegistration`. ``memory_bytes``: of the agent's DRAM tier."""
    if message.incarnation > now_ms + AHEAD_MAX_MS:
        raise BadRegistration(
            f"engine {message.engine}: incarnation {message.incarnation} is more than a day ahead "
            "of this host's clock"
        )
    layout = _layout(message)
    if layout.block_bytes > memory_bytes:
        raise BadRegistration(
            f"engine {message.engine}: blocks of {layout.block_bytes} bytes, but this agent has "
            f"{memory_bytes} bytes of DRAM"
        )
    for index in range(len(message.ranks)):
        _addresses(message, index)


def _layout(message: RegisterEngine) -> BlockLayout:
    """Of the blocks that this engine's ranks hold together. Raises :class:`BadRegistration`."""
    layout, shards = message.namespace.layout, message.shards
    sizes = layout.component_bytes
    if layout.shards != 1 or not 1 <= shards <= len(message.ranks) <= WORDS:
        raise BadRegistration(f"engine {message.engine}: {shards} shards of {layout}")
    if not 0 < layout.num_layers <= LAYERS_MAX or not 0 < layout.page_tokens <= PAGE_TOKENS_MAX:
        raise BadRegistration(f"engine {message.engine}: {layout}")
    if (
        not 0 < len(sizes) <= COMPONENTS_MAX
        or min(sizes) <= 0
        or any(size % (shards * layout.page_tokens) for size in sizes)
    ):
        raise BadRegistration(f"engine {message.engine}: {sizes} bytes in {shards} shards")
    return msgspec.structs.replace(layout, shards=shards)


def _rank(message: RegisterEngine, index: int, credit: CreditWord) -> Rank:
    memory: RankMemory = message.ranks[index]
    shard = index * message.shards // len(message.ranks)
    addresses = _addresses(message, index)
    return Rank(memory.session_id, addresses, memory.board_address, shard, credit, memory.data_port)


def _addresses(message: RegisterEngine, index: int) -> np.ndarray:
    """Of a rank's buffers. Raises :class:`BadRegistration`."""
    memory, layout = message.ranks[index], message.namespace.layout
    shape = (layout.num_layers, len(layout.component_bytes))
    try:
        addresses = np.array(memory.kv_addresses, np.int64)
    except ValueError as error:  # rows of unlike lengths
        raise BadRegistration(f"engine {message.engine}: {error}") from error
    if addresses.shape != shape or not addresses.size:
        raise BadRegistration(
            f"engine {message.engine}: addresses of shape {addresses.shape} for a layout of {shape}"
        )
    end = int(addresses.max()) + max(layout.component_bytes) // message.shards * message.pages
    if end > INT64_MAX or not _SESSION.fullmatch(memory.session_id):
        raise BadRegistration(
            f"engine {message.engine}: no memory of a peer, {memory.session_id} up to {end:#x}"
        )
    return addresses
