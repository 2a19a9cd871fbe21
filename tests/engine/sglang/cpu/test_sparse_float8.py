"""The reference of sparse attention on a CPU reads what SGLang's own pool keeps, in each type."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.sglang.kv_pool import numbers_of

LATENT, ROPE, HEADS, TOKENS, PREFIX = 128, 64, 2, 70, 40
SCALED = LATENT + 4 + 2 * ROPE


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
    from sglang.srt.mem_cache import memory_pool
    from sglang.srt.runtime_context import get_parallel

    from engine.sglang.cpu.sparse import attention

    monkeypatch.setattr(memory_pool, "set_mla_kv_buffer_triton", attention.write_latents)
    monkeypatch.setattr(memory_pool, "quantize_k_cache_separate", attention.quantized_latents)
    with get_parallel().override(attn_dcp_size=1):
        yield


def pool_of(dtype: torch.dtype, row_numbers: int) -> Any:
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    return DSATokenToKVPool(
        size=4 * 64,
        page_size=64,
        kv_lora_rank=LATENT,
        dtype=dtype,
        qk_rope_head_dim=ROPE,
        layer_num=1,
        device="cpu",
        index_head_dim=128,
        enable_memory_saver=False,
        kv_cache_dim=row_numbers,
        index_buf_size=4 * 64,
        dcp_replicated=True,
    )


@pytest.mark.parametrize(
    ("dtype", "row_numbers", "off_by"),
    [
        (torch.float32, LATENT + ROPE, 0.0),
        (torch.float8_e4m3fn, LATENT + ROPE, 0.07),
        (torch.float8_e4m3fn, SCALED, 0.07),
    ],
    ids=["float32", "raw", "scaled"],
)
def test_attention_is_over_the_numbers_that_the_pool_keeps(dtype, row_numbers, off_by):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from engine.sglang.cpu.sparse.attention import SparseAttention

    pool, rows = pool_of(dtype, row_numbers), torch.randperm(4 * 64)[:TOKENS]
    latents, positions = torch.randn(TOKENS, 1, LATENT), torch.randn(TOKENS, 1, ROPE)
    layer = SimpleNamespace(tp_q_head_num=HEADS, v_head_dim=LATENT, scaling=0.1, layer_id=0)
    pool.set_mla_kv_buffer(layer, rows[:PREFIX], latents[:PREFIX], positions[:PREFIX])
    backend: Any = object.__new__(SparseAttention)
    backend.token_to_kv_pool = pool
    backend.req_to_token_pool = SimpleNamespace(req_to_token=rows[None])
    batch = SimpleNamespace(
        seq_lens=torch.tensor([TOKENS]),
        extend_seq_lens=torch.tensor([TOKENS - PREFIX]),
        req_pool_indices=torch.tensor([0]),
        out_cache_loc=rows[PREFIX:],
        forward_mode=ForwardMode.EXTEND,
    )
    chosen = torch.stack([torch.randperm(PREFIX)[:8] for _ in range(TOKENS - PREFIX)])
    queries = torch.randn(TOKENS - PREFIX, HEADS, LATENT + ROPE)
    q, q_rope = queries.split([LATENT, ROPE], -1)
    given = (q.flatten(1), latents[PREFIX:], latents[PREFIX:], layer, batch)
    new = {"q_rope": q_rope, "k_rope": positions[PREFIX:], "topk_indices": chosen.int()}
    seen = backend.forward_extend(*given, **new).view(-1, HEADS, LATENT)

    kept = numbers_of(pool, pool.kv_buffer[0][rows])
    written = torch.cat([latents, positions], -1)[:, 0]
    assert torch.allclose(kept, written, rtol=off_by, atol=0.01 if off_by else 0)
    for query, picked, out in zip(queries, chosen, seen, strict=True):
        weights = (query @ kept[picked].T * 0.1).softmax(-1)
        assert torch.allclose(out, weights @ kept[picked, :LATENT], atol=1e-5)
