"""The ranks of a tensor-parallel engine cut alike, though each measures its own times."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import msgspec
import pytest

RANKS = 2
FORWARDS = 20


def one_rank(rank: int, folder: Path, answers: multiprocessing.Queue) -> None:
    os.environ |= {
        "XDG_CACHE_HOME": str(folder / f"rank{rank}"),
        "SGLANG_PLATFORM": "dualpath_cpu",
        "OMP_NUM_THREADS": "1",
    }
    import torch

    from common.user_files import keep
    from engine.prefill import profile as prefill_profile
    from engine.prefill.forward_clock import ForwardSample
    from engine.prefill.timing import PrefillTiming
    from engine.sglang.prefill.made_up_forwards import MadeUpForwards
    from tests.engine.prefill.test_forward_clock import busy, forward_batch, scheduler

    store = torch.distributed.FileStore(str(folder / "store"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    own = scheduler()
    own.server_args.tp_size = RANKS
    own.attn_tp_cpu_group = own.tp_cpu_group = torch.distributed.group.WORLD
    if rank == 0:  # the other one has no profile
        samples = [
            ForwardSample([new], [context], 0.01, 1e-8 * new * (context + new / 2))
            for new in (256, 1024)
            for context in (0, 4096)
        ]
        path = prefill_profile.profile_path(MadeUpForwards(own), "a model")
        keep(path, msgspec.json.encode(samples))
    timing = PrefillTiming(own, 0.05)
    timing.start_quota("a model", 64)

    def forward() -> None:
        timing.clock.attention(lambda: busy(0.01 + 0.02 * rank))

    rooms = []
    for _ in range(FORWARDS):
        rooms.append(timing.quota.new_batch().room(4096, 100_000))
        timing.clock.forward(forward, forward_batch())
    answers.put((rank, rooms))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_with_times_of_their_own_cut_alike(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=one_rank, args=(rank, tmp_path, answers)) for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    try:
        rooms = dict(answers.get(timeout=240) for _ in ranks)
    finally:
        for process in ranks:
            process.join(10)
            process.kill()
    assert rooms[0] == rooms[1]
    assert rooms[0][-1] < rooms[0][0], "the slowest one's times count"
