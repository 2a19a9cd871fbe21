"""The engines that an agent serves: who they are now, and what is open with each."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

import msgspec
import numpy as np

from common.block import BlockLayout, label_of
from common.ids import JobId
from common.messages import JobEnded, PullEnded, RankMemory, RegisterEngine
from transfer.agent.jobs.job import Job
from transfer.credits import WORDS, CreditBoard, CreditWord
from transfer.mooncake import host_of

JOBS_REMEMBERED = 65536
UNSENT_MAX = 4096


class BadRegistration(Exception):
    """The engine's KV memory does not fit its layout."""


class BadPages(Exception):
    """The pages of a job are no pages, or not one for each block."""


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

    @property
    def host(self) -> str:
        """Address that it has given to Mooncake."""
        return host_of(self.session_id)


class Engine:
    """One incarnation of an engine."""

    def __init__(self, identity: bytes, message: RegisterEngine, credits: CreditBoard) -> None:
        """Raises :class:`BadRegistration`."""
        _layout(message)
        self._credits = credits.take(len(message.ranks))
        self.name = message.engine
        self.incarnation = message.incarnation
        self.is_gone = False
        """A newer incarnation has replaced it."""
        self.jobs: dict[JobId, Job] = {}
        """Deliveries and pulls in a queue, by job number."""
        self.unsent: deque[JobEnded | PullEnded] = deque(maxlen=UNSENT_MAX)
        """Ends of jobs that found no connection: sent when it registers again."""
        self._seen_jobs: OrderedDict[JobId, None] = OrderedDict()
        self.update(identity, message)

    def update(self, identity: bytes, message: RegisterEngine) -> None:
        """The same process says it again: it has reconnected, or its weights have changed."""
        if len(message.ranks) != len(self._credits):
            raise BadRegistration(f"engine {message.engine}: other ranks than before")
        self.identity = identity
        self.layout = _layout(message)
        self.label = msgspec.structs.replace(label_of(message.namespace), layout=self.layout)
        self.ranks = [_rank(message, index, word) for index, word in enumerate(self._credits)]

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
        if known is not None:
            self._by_identity.pop(known.identity, None)
        replaced = None
        if known is None or message.incarnation > known.incarnation:
            known, replaced = Engine(identity, message, self._credits), known
        else:
            known.update(identity, message)
        self._by_name[known.name] = self._by_identity[identity] = known
        if replaced is not None:
            replaced.is_gone = True
        return known, replaced


def page_array(pages: Sequence[int], blocks: int) -> np.ndarray:
    """A job's pages, one for each block; shape (blocks,), int64. Raises :class:`BadPages`."""
    try:
        array = np.array(pages, np.int64)
    except OverflowError as error:
        raise BadPages(str(error)) from error
    if len(array) != blocks or (array < 0).any():
        raise BadPages(
            f"{len(array)} pages for {blocks} blocks, the least is {min(pages, default=0)}"
        )
    return array


def _layout(message: RegisterEngine) -> BlockLayout:
    """Of the blocks that this engine's ranks hold together. Raises :class:`BadRegistration`."""
    layout, shards = message.namespace.layout, message.shards
    sizes = layout.component_bytes
    if layout.shards != 1 or not 1 <= shards <= len(message.ranks) <= WORDS:
        raise BadRegistration(f"engine {message.engine}: {shards} shards of {layout}")
    if not sizes or min(sizes) <= 0 or any(size % (shards * layout.page_tokens) for size in sizes):
        raise BadRegistration(f"engine {message.engine}: {sizes} bytes in {shards} shards")
    return msgspec.structs.replace(layout, shards=shards)


def _rank(message: RegisterEngine, index: int, credit: CreditWord) -> Rank:
    memory: RankMemory = message.ranks[index]
    layout = message.namespace.layout
    shape = (layout.num_layers, len(layout.component_bytes))
    try:
        addresses = np.array(memory.kv_addresses, np.int64)
    except (ValueError, OverflowError) as error:
        raise BadRegistration(f"engine {message.engine}: {error}") from error
    if addresses.shape != shape or not addresses.size:
        raise BadRegistration(
            f"engine {message.engine}: addresses of shape {addresses.shape} for a layout of {shape}"
        )
    shard = index * message.shards // len(message.ranks)
    return Rank(memory.session_id, addresses, memory.board_address, shard, credit)
