"""Pulls: jobs that read blocks out of an engine's pages into DRAM slots, from ``PullBlocks`` to
``PullEnded``. Each block is read once. The engine's end is ``engine/decode/persist.py``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from functools import partial
from itertools import chain

import msgspec
import numpy as np

from common.block import TENANT_CHARS, BlockKey, BlockLabel, BlockLayout, part_key
from common.messages.from_agents import PullEnded
from common.messages.from_engines import PullBlocks
from storage.tiered_store import TieredStore
from transfer.agent.engine_pools import BadJob, EnginePool, Objects
from transfer.agent.engines import Engine, Rank
from transfer.agent.jobs.job import Job
from transfer.agent.jobs.reports import Reports
from transfer.agent.jobs.transfer import Ended, Group, Transfer
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.mooncake import TransferFailed
from transfer.ranges import Addresses

log = logging.getLogger(__name__)


class _Pull(msgspec.Struct, eq=False):
    """``objects``: that it names in each pool of the engine; ``waits_for``: those that this pull or
    an earlier one is filling."""

    engine: Engine
    message: PullBlocks
    objects: list[Objects]
    waits_for: set[BlockKey]


class _Quarantine(msgspec.Struct, eq=False):
    """Slots of a failed read: not reused while bytes may still land in them."""

    engine: Engine
    keys: list[BlockKey]


class PullJobs:
    """Starts and ends pulls. Lives in the agent's loop."""

    def __init__(
        self,
        queue: TransferQueue,
        store: TieredStore,
        memory_address: int,
        host: str,
        held: Callable[[list[BlockKey]], list[bool]],
        reports: Reports,
    ) -> None:
        """``memory_address``: of the store's slots. ``host``: this agent's, as Mooncake knows it.
        ``held``: which blocks the agent has in any tier."""
        self._queue = queue
        self._store = store
        self._memory_address = memory_address
        self._host = host
        self._held = held
        self._reports = reports
        self._filling: dict[BlockKey, list[_Pull]] = {}
        """Blocks on their way out of an engine -> the pulls that wait for them."""
        self._quarantines: list[_Quarantine] = []

    def start(self, engine: Engine, message: PullBlocks) -> None:
        """Pull those blocks that are neither held nor on their way here."""
        try:
            objects = engine.objects(message)
        except BadJob as error:
            log.warning("pull refused engine=%s job=%d: %s", engine.name, message.job, error)
            self._finish(_Pull(engine, message, [], set()))
            return
        offsets = [
            self._store.reserve(each.keys, pool.layout.block_bytes)
            for pool, each in zip(engine.pools, objects, strict=False)
        ]
        for key in chain(*offsets):
            self._filling[key] = []
        named = chain.from_iterable(each.keys for each in objects)
        pull = _Pull(engine, message, objects, {key for key in named if key in self._filling})
        for key in pull.waits_for:
            self._filling[key].append(pull)
        if any(offsets):
            self._submit(pull, offsets)
        elif not pull.waits_for:
            self._finish(pull)

    def release_quarantine(self, begin_fence: Callable[[Engine, Callable[[], None]], None]) -> None:
        """Have slots given back when nothing can land in them any more; call a few times a
        second. ``begin_fence``: :meth:`transfer.agent.fences.Fences.begin`."""
        for quarantine in list(self._quarantines):
            begin_fence(quarantine.engine, partial(self._release, quarantine))

    def _release(self, quarantine: _Quarantine) -> None:
        self._quarantines.remove(quarantine)
        for key in quarantine.keys:
            self._store.abandon(key)

    @property
    def quarantined_slots(self) -> int:
        """Slots that are out of use since bytes may still land in them."""
        return sum(len(quarantine.keys) for quarantine in self._quarantines)

    def _submit(self, pull: _Pull, offsets: list[dict[BlockKey, int]]) -> None:
        engine, message, started = pull.engine, pull.message, time.monotonic()
        labels: dict[BlockKey, BlockLabel] = {}
        moved: list[tuple[BlockLayout, Addresses, Addresses]] = []
        for pool, objects, wanted in zip(engine.pools, pull.objects, offsets, strict=False):
            row_of = {key: row for row, key in enumerate(objects.keys)}
            labels |= _labels(pool, message, objects, wanted)
            slots = self._memory_address + np.fromiter(wanted.values(), np.int64, len(wanted))
            rows = np.array([row_of[key] for key in wanted], np.int64)
            moved.append((pool.layout.shard, slots, objects.places[rows]))

        def transfer(rank: Rank, ended: Ended) -> Transfer:
            groups = [
                Group(shard, addresses, slots + rank.shard * shard.block_bytes, places)
                for (shard, slots, places), addresses in zip(moved, rank.addresses, strict=False)
            ]
            return Transfer(
                job=message.job,
                session_id=rank.session_id,
                groups=groups,
                deadline=started + message.deadline_s,
                ended=ended,
                is_read=True,
            )

        def ended(error: Exception | None) -> None:
            self._ended(pull, labels, job.nbytes, started, error)

        job = engine.jobs[message.job] = Job(self._queue, ended)
        job.submit([partial(transfer, rank) for rank in _holders(engine.ranks, self._host)])

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
        self._reports.counters.pulled(error is None, nbytes)
        log.log(
            logging.INFO if error is None else logging.WARNING,
            "pull ended engine=%s job=%d blocks=%d bytes=%d seconds=%.4f error=%s",
            engine.name,
            job,
            len(keys),
            nbytes,
            time.monotonic() - started,
            error or "",
        )
        if error is None:
            older = self._older(pull.message, next(iter(labels.values())).part)
            for key, label in labels.items():
                replaced = [part_key(label.part, block) for block in older]
                self._store.commit(key, label, replaced, pull.message.is_branch)
        elif isinstance(error, TransferFailed):
            engine.failures += 1
            self._quarantines.append(_Quarantine(engine, keys))
            for key in keys:
                self._store.quarantine(key)
        else:
            for key in keys:
                self._store.abandon(key)
        for key in keys:
            for waiting in self._filling.pop(key):
                waiting.waits_for.discard(key)
                if not waiting.waits_for:
                    self._finish(waiting)

    def _finish(self, pull: _Pull) -> None:
        message = pull.message
        if pull.objects:
            held = self._held([key for each in pull.objects for key in each.keys])
        else:  # refused, and of no part is known what it would be
            held = self._held(message.keys)
            held += [False] * sum(len(each.keys) for each in message.parts)
        ended = PullEnded(self._reports.incarnation, message.job, held)
        self._reports.reply(pull.engine, ended)

    def _older(self, message: PullBlocks, part: str) -> list[BlockKey]:
        """Blocks that the message names of which a snapshot is here: few of them have any, and what
        one part lacks is not asked of the others."""
        of_part = [part_key(part, key) for key in message.replaces]
        held = self._held(of_part)
        return [key for key, is_held in zip(message.replaces, held, strict=True) if is_held]


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
    pool: EnginePool, message: PullBlocks, objects: Objects, wanted: Container[BlockKey]
) -> dict[BlockKey, BlockLabel]:
    """Of each wanted object of the pull. A block that follows another is its child; an object of a
    part is the child of its block."""
    tenant = message.tenant[:TENANT_CHARS]
    parents = objects.blocks if pool.part else [message.parent, *objects.blocks[:-1]]
    return {
        key: msgspec.structs.replace(pool.label, tenant=tenant, parent=parent)
        for key, parent in zip(objects.keys, parents, strict=False)
        if key in wanted
    }
