"""The engines that an agent serves: who they are now, and what is open with each."""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Set

import msgspec
import numpy as np

from common.block import BlockLayout
from common.ids import BoardSlot, JobId
from common.messages.from_agents import JobEnded, PullEnded
from common.messages.from_engines import Deliver, PullBlocks, RankMemory, RegisterEngine
from transfer.agent.engine_pools import (
    BadRegistration,
    Objects,
    engine_pools,
    object_bytes_max,
    objects_of,
    rank_addresses,
)
from transfer.agent.jobs.job import Job
from transfer.credits import CreditBoard, CreditWord, credit_tag
from transfer.mooncake import host_of

JOBS_REMEMBERED = 65536
UNSENT_MAX = 4096
AHEAD_MAX_MS = 86_400_000
"""How far an engine's number may be ahead of the cluster's time: a day. One from farther on would
keep every later start of the engine out."""
_SESSION = re.compile(r"\S+:\d{1,5}")


class Rank(msgspec.Struct, frozen=True, eq=False):
    """One rank of an engine."""

    session_id: str
    addresses: list[np.ndarray]
    """Of the buffers in each of :attr:`Engine.pools`; shape (layers, components), int64."""
    some_address: int
    """Of KV memory: there are bytes that may be read."""
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
        engine_pools(message)
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
        pools = engine_pools(message)
        ranks = [_rank(message, index, word) for index, word in enumerate(self._credits)]
        self.identity, self.pools, self.ranks = identity, pools, ranks
        self._board_slots = message.board_slots

    @property
    def layout(self) -> BlockLayout:
        """Of the blocks that its ranks hold together."""
        return self.pools[0].layout

    def objects(self, message: Deliver | PullBlocks) -> list[Objects]:
        """What a job names in each of the pools. Raises :class:`BadJob`."""
        return objects_of(self.pools, message.keys, message.pages, message.parts)

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
    """Raises :class:`BadRegistration`. ``now_ms``: the cluster's time, in which incarnations
    are. ``memory_bytes``: of the agent's DRAM tier."""
    if message.incarnation > now_ms + AHEAD_MAX_MS:
        raise BadRegistration(
            f"engine {message.engine}: incarnation {message.incarnation} is more than a day ahead "
            "of the cluster's time"
        )
    engine_pools(message)
    block_bytes = object_bytes_max(message.namespace)
    if block_bytes > memory_bytes:
        raise BadRegistration(
            f"engine {message.engine}: blocks of {block_bytes} bytes, but this agent has "
            f"{memory_bytes} bytes of DRAM"
        )
    for index in range(len(message.ranks)):
        _check_session(message.engine, message.ranks[index])
        rank_addresses(message, index)


def _check_session(engine: str, memory: RankMemory) -> None:
    if not _SESSION.fullmatch(memory.session_id):
        raise BadRegistration(f"engine {engine}: no memory of a peer, {memory.session_id!r}")


def _rank(message: RegisterEngine, index: int, credit: CreditWord) -> Rank:
    memory: RankMemory = message.ranks[index]
    _check_session(message.engine, memory)
    layout, addresses = message.namespace.layout, rank_addresses(message, index)
    first = next(layer for layer in range(layout.num_layers) if any(layout.sizes(layer)))
    component = next(i for i, size in enumerate(layout.sizes(first)) if size)
    return Rank(
        session_id=memory.session_id,
        addresses=addresses,
        some_address=int(addresses[0][first, component]),
        board_address=memory.board_address,
        shard=index * message.shards // len(message.ranks),
        credit=credit,
        data_port=memory.data_port,
    )
