"""Pulls of an agent: blocks out of an engine's pages into DRAM slots, each block once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from functools import partial

import msgspec
import numpy as np

from common.block import TENANT_CHARS, BlockKey, BlockLabel
from common.ids import Incarnation
from common.messages import PullBlocks, PullEnded
from storage.tiered_store import TieredStore
from transfer.agent.delivery import TransferJob, TransferQueue
from transfer.agent.engines import BadPages, Engine, Rank, page_array
from transfer.agent.job_group import Ended, JobGroup
from transfer.agent.metrics import AgentCounters
from transfer.mooncake import LANDED_AFTER_S, TransferFailed

log = logging.getLogger(__name__)


class _Pull(msgspec.Struct, eq=False):
    """``waits_for``: blocks that this pull or an earlier one is filling."""

    engine: Engine
    message: PullBlocks
    waits_for: set[BlockKey]


class _Quarantine(msgspec.Struct):
    """Slots of a failed read: not reused while bytes may still land in them."""

    engine: Engine
    keys: list[BlockKey]
    until: float


class PullJobs:
    """Starts and ends pulls. Lives in the agent's loop."""

    def __init__(
        self,
        queue: TransferQueue,
        store: TieredStore,
        memory_address: int,
        host: str,
        reply: Callable[[Engine, PullEnded], None],
        held: Callable[[list[BlockKey]], list[bool]],
        incarnation: Incarnation,
        counters: AgentCounters,
    ) -> None:
        self._queue = queue
        self._store = store
        self._memory_address = memory_address
        self._host = host
        self._reply = reply
        self._held = held
        self._incarnation = incarnation
        self._counters = counters
        self._filling: dict[BlockKey, list[_Pull]] = {}
        """Blocks on their way out of an engine -> the pulls that wait for them."""
        self._quarantines: list[_Quarantine] = []

    def start(self, engine: Engine, message: PullBlocks) -> None:
        """Pull those blocks that are neither held nor on their way here."""
        try:
            pages = page_array(message.pages, len(message.keys))
        except BadPages as error:
            log.warning("pull refused engine=%s job=%d: %s", engine.name, message.job, error)
            self._finish(_Pull(engine, message, set()))
            return
        offsets = self._store.reserve(message.keys)
        for key in offsets:
            self._filling[key] = []
        pull = _Pull(engine, message, {key for key in message.keys if key in self._filling})
        for key in pull.waits_for:
            self._filling[key].append(pull)
        if offsets:
            self._submit(pull, pages, offsets)
        elif not pull.waits_for:
            self._finish(pull)

    def release_quarantine(self) -> None:
        """Give back slots into which nothing can land any more; call a few times a second."""
        now = time.monotonic()
        over = [q for q in self._quarantines if q.engine.is_gone or now >= q.until]
        for quarantine in over:
            self._quarantines.remove(quarantine)
            for key in quarantine.keys:
                self._store.abandon(key)

    @property
    def quarantined_slots(self) -> int:
        """Slots that are out of use since bytes may still land in them."""
        return sum(len(quarantine.keys) for quarantine in self._quarantines)

    def _submit(self, pull: _Pull, pages: np.ndarray, offsets: dict[BlockKey, int]) -> None:
        engine, message = pull.engine, pull.message
        row_of = {key: row for row, key in enumerate(message.keys)}
        started, labels = time.monotonic(), _labels(engine.label, message, offsets)
        shard = engine.layout.shard
        slots = self._memory_address + np.fromiter(offsets.values(), np.int64, len(offsets))
        pages = pages[[row_of[key] for key in offsets]]

        def rank_job(rank: Rank, ended: Ended) -> TransferJob:
            return TransferJob(
                message.job,
                rank.session_id,
                shard,
                rank.kv_addresses,
                slots + rank.shard * shard.block_bytes,
                pages,
                started + message.deadline_s,
                ended,
                is_read=True,
            )

        def ended(error: Exception | None) -> None:
            self._ended(pull, labels, group.nbytes, started, error)

        group = engine.jobs[message.job] = JobGroup(self._queue, ended)
        group.submit([partial(rank_job, rank) for rank in _holders(engine.ranks, self._host)])

    def _ended(
        self,
        pull: _Pull,
        labels: dict[BlockKey, BlockLabel],
        nbytes: int,
        started: float,
        error: Exception | None,
    ) -> None:
        engine, job, keys = pull.engine, pull.message.job, list(labels)
        engine.jobs.pop(job, None)
        self._counters.pulled(error is None, nbytes)
        log.log(
            logging.INFO if error is None else logging.WARNING,
            "pull ended engine=%s job=%d blocks=%d bytes=%d seconds=%.4f error=%s",
            *(engine.name, job, len(keys), nbytes, time.monotonic() - started),
            error or "",
        )
        if error is None:
            for key, label in labels.items():
                self._store.commit(key, label)
        elif isinstance(error, TransferFailed) and not engine.is_gone:
            self._quarantines.append(_Quarantine(engine, keys, time.monotonic() + LANDED_AFTER_S))
        else:
            for key in keys:
                self._store.abandon(key)
        for key in keys:
            for pull in self._filling.pop(key):
                pull.waits_for.discard(key)
                if not pull.waits_for:
                    self._finish(pull)

    def _finish(self, pull: _Pull) -> None:
        held = self._held(pull.message.keys)
        self._reply(pull.engine, PullEnded(self._incarnation, pull.message.job, held))


def _holders(ranks: Sequence[Rank], host: str) -> list[Rank]:
    """One rank for each shard: those that hold the same heads compute the same KV.

    One on this host, if there is any: what is read crosses a link in the engine's traffic
    class (docs/traffic.md), but from here to here it crosses none.
    """
    by_shard: dict[int, Rank] = {}
    for rank in ranks:
        known = by_shard.get(rank.shard)
        if known is None or (known.host != host and rank.host == host):
            by_shard[rank.shard] = rank
    return list(by_shard.values())


def _labels(
    of_engine: BlockLabel, message: PullBlocks, wanted: Container[BlockKey]
) -> dict[BlockKey, BlockLabel]:
    """Of each wanted block of the pull; one that follows another is its child."""
    tenant = message.tenant[:TENANT_CHARS]
    parents = [message.parent, *message.keys[:-1]]
    return {
        key: msgspec.structs.replace(of_engine, tenant=tenant, parent=parent)
        for key, parent in zip(message.keys, parents, strict=True)
        if key in wanted
    }
