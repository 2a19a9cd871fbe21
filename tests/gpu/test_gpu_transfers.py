"""(d) of docs/gpu.md: Mooncake over TCP, from host memory into a GPU's and back."""

from __future__ import annotations

import numpy as np
import torch

from transfer.mooncake import TransferPeer

SIZE_BYTES = 64 << 20


def test_d_bytes_survive_the_way_into_gpu_memory_and_back():
    engine, agent = TransferPeer("127.0.0.1", "tcp"), TransferPeer("127.0.0.1", "tcp")
    pool = torch.randint(0, 256, (SIZE_BYTES,), dtype=torch.uint8, device="cuda")  # poisoned
    block = np.random.default_rng(1).integers(0, 256, SIZE_BYTES, np.uint8)
    back = np.zeros_like(block)
    torch.cuda.synchronize()
    engine.register(pool.data_ptr(), SIZE_BYTES)
    for array in (block, back):
        agent.register(array.ctypes.data, SIZE_BYTES)
    here, there = np.array([block.ctypes.data]), np.array([pool.data_ptr()])
    length = np.array([SIZE_BYTES])
    agent.write(engine.session_id, here, there, length)
    assert np.array_equal(pool.cpu().numpy(), block)
    agent.read(engine.session_id, np.array([back.ctypes.data]), there, length)
    assert np.array_equal(back, block)
