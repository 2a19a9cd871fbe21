"""Ranks of one engine on two hosts, each started by a launcher of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import msgspec
import pytest
import torch

from common.ids import Incarnation
from common.loads import ModelBounds
from engine import runtime as runtime_module
from engine.config import EngineConfig
from engine.host import Host
from engine.kv_memory import KvMemory
from engine.report import EngineIdentity
from engine.runtime import EngineRuntime
from engine.streams import Streams
from tests.control import SECRET
from tests.engine.parts import NAMESPACE
from tests.engine.test_runtime import TransferEngine, scheduler

RANKS = 2
INCARNATIONS = [Incarnation(1_700_000_000_000), Incarnation(1_700_000_003_456)]
MEET_WITHIN_S = 20


class Meeting:
    """Stands for the process group of threads, each of which is a rank."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=MEET_WITHIN_S)
        self._values: list[Any] = [None] * RANKS
        self._rank = threading.local()

    def as_rank(self, rank: int, build: Callable[[int], EngineRuntime]) -> EngineRuntime:
        self._rank.number = rank
        return build(rank)

    def gather(self, values: list[Any], value: object, group: object) -> None:
        self._values[self._rank.number] = msgspec.json.encode(value)
        self._barrier.wait()
        values[:] = [msgspec.json.decode(each, type=type(value)) for each in self._values]
        self._barrier.wait()


@pytest.fixture
def ranks(tmp_path, monkeypatch) -> list[EngineRuntime]:
    """Of a decode engine without agents."""
    meeting = Meeting()
    monkeypatch.setattr(torch.distributed, "all_gather_object", meeting.gather)
    monkeypatch.setattr(runtime_module, "model_digest", lambda folder: NAMESPACE.model_digest)

    def build(rank: int) -> EngineRuntime:
        own = scheduler()
        own.attn_tp_group.rank_in_group, own.attn_tp_group.world_size = rank, RANKS
        config = EngineConfig("d0", "decode", [], "a", {}, control_secret=SECRET)
        bounds = ModelBounds(100, 64, 60)
        host = Host(
            identity=EngineIdentity("d0", "decode", "a", "d0", INCARNATIONS[rank], 0, bounds),
            control=f"ipc://{tmp_path}/control-{rank}",
            scheduler=own,
            transfer_engine=cast(Any, TransferEngine()),
            data_port=0,
            memory=KvMemory(NAMESPACE.layout, [[1, 2]] * 3, NAMESPACE.kv_dtype),
            allocators=[own.token_to_kv_pool_allocator],
            window=None,
            states=None,
            streams=Streams(),
            model_path="/models/x",
            weight_version=NAMESPACE.weight_version,
            settings=NAMESPACE.settings,
        )
        return EngineRuntime(config, host)

    with ThreadPoolExecutor(RANKS) as pool:
        return list(pool.map(meeting.as_rank, range(RANKS), [build] * RANKS))


def test_ranks_number_their_jobs_alike_whoever_has_started_them(ranks):
    """An end that the leader makes known would not be one of the other rank's jobs otherwise."""

    def opened(engine: EngineRuntime) -> int:
        return engine.jobs.open("a", Incarnation(1), [1], 60.0, lambda reason: None)

    leaders, other = map(opened, ranks)
    assert leaders == other
    leader, follower = ranks
    leader.jobs.over(leaders)
    travelling = list(leader.ranks.take())
    for engine in ranks:
        engine.ranks.arrived(travelling)
    assert [len(engine.jobs) for engine in ranks] == [0, 0]
    assert follower.holds.held_pages() == []
