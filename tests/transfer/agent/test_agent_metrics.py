"""What an operator can see of each tier."""

from __future__ import annotations

import math

from common.block import TierName
from common.samples import Latencies
from storage.index.holdings import Holdings
from storage.share_queue import ShareQueue
from storage.slot_pool import SlotPool
from storage.store_events import StoreStats
from storage.tiers.contract import EvictionCause, IoStats, RoomStats, TierStats
from tests.samples import by_name
from transfer.agent.metrics import store_samples


def test_every_tier_says_what_it_holds_does_and_loses() -> None:
    room = RoomStats(capacity_bytes=100, used_bytes=50, blocks=5)
    room.evictions_total[EvictionCause.QUOTA] = 2
    io = IoStats(reads_in_flight=3, hits_total=7, corrupt_blocks_total=1, retries_total=4)
    io.read_latency.note(0.003)
    ssd = TierStats(room, io)
    pool = SlotPool(memoryview(bytearray(3 * 8192)), 5000)
    stats = StoreStats(slots=pool.num_slots).snapshot(
        pool, Holdings(), ShareQueue(), {TierName.SSD: ssd}, {TierName.SSD: 9.0}
    )
    samples = by_name(store_samples(stats))
    for name, value in {
        'tier_bytes{tier="ssd"}': 50,
        'tier_blocks{tier="ssd"}': 5,
        'tier_blocks_in_flight{tier="ssd",kind="read"}': 3,
        'tier_hits_total{tier="ssd"}': 7,
        'evicted_blocks_total{tier="ssd",cause="quota"}': 2,
        'evicted_blocks_total{tier="ssd",cause="dropped"}': 0,
        'corrupt_blocks_total{tier="ssd"}': 1,
        'storage_retries_total{tier="ssd"}': 4,
        'storage_read_seconds_bucket{tier="ssd",le="0.0025"}': 0,
        'storage_read_seconds_bucket{tier="ssd",le="0.005"}': 1,
        'storage_read_seconds_count{tier="ssd"}': 1,
        'tier_capacity_bytes{tier="dram"}': 3 * 8192,
        'tier_bytes{tier="dram"}': 0,
    }.items():
        assert samples[f"dualpath:agent_{name}"] == value, name


def test_a_latency_beyond_the_last_bucket_is_counted() -> None:
    latencies = Latencies()
    for seconds in (0.0001, 0.002, 0.002, 99.0):
        latencies.note(seconds)
    assert latencies.quantile_s(0.5) == 0.0025 and latencies.quantile_s(1.0) is None
    cumulative = dict(latencies.cumulative())
    assert cumulative[10] == 3
    assert cumulative[math.inf] == latencies.count == 4
