"""``bench``: how fast a store's blocks are read, verified, beside plain reads of the same bytes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import msgspec

from storage.tools.progress import THREADS, in_threads
from storage.tools.view import StoredBlock, StoreUnusable, StoreView

ROUNDS = 3


class ReadRates(msgspec.Struct, frozen=True):
    """Of a store's blocks."""

    url: str
    threads: int
    block_median_bytes: int
    verified_read_per_s_bytes: int
    plain_read_per_s_bytes: int
    verified_of_plain: float


def bench(view: StoreView, seconds: float) -> ReadRates:
    """Medians of interleaved rounds, in bytes per second. It reads only; on a live store it
    competes with the store's owner for ``2 * ROUNDS * seconds``.

    Raises :class:`StoreUnusable` for an empty store.
    """
    blocks = list(view.blocks())
    if not blocks:
        raise StoreUnusable(f"{view.url} holds no block to read")
    verified: list[float] = []
    plain: list[float] = []
    for number in range(ROUNDS):
        verified.append(_rate(view.read, blocks, seconds, number))
        plain.append(_rate(view.read_plain, blocks, seconds, number))
    sizes = [block.payload_bytes for block in blocks]
    return ReadRates(
        url=view.url,
        threads=THREADS,
        block_median_bytes=int(statistics.median(sizes)),
        verified_read_per_s_bytes=int(statistics.median(verified)),
        plain_read_per_s_bytes=int(statistics.median(plain)),
        verified_of_plain=round(statistics.median(verified) / statistics.median(plain), 3),
    )


def _rate(
    read: Callable[[StoredBlock], object], blocks: list[StoredBlock], seconds: float, seed: int
) -> float:
    """Bytes per second of random blocks."""
    chance = random.Random(seed)
    start = time.perf_counter()

    def choose() -> StoredBlock | None:
        return chance.choice(blocks) if time.perf_counter() < start + seconds else None

    def work(block: StoredBlock) -> int:
        read(block)
        return block.payload_bytes

    nbytes = sum(in_threads(work, iter(choose, None)))
    return nbytes / (time.perf_counter() - start)
