"""The KV memory map agrees with SGLang's own pools, byte by byte."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from common.block import BlockLayout
from engine.kv_memory import UnlikeDraft, poison, poison_index_keys
from engine.sglang.kv_pool import UnsupportedPool, kv_format, memory_of, numbers_of

PAGE, LAYERS = 4, 3


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        yield


def _mha(**kwargs):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return MHATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        head_num=2,
        head_dim=8,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
        enable_alt_stream=False,
        **{"dtype": torch.float32, **kwargs},
    )


def _mla(dtype=torch.bfloat16):
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    return MLATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=dtype,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


def _dsa(skip_topk_layers, latent=16, **kwargs):
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool

    return DSATokenToKVPool(
        size=8 * 64,
        page_size=64,
        kv_lora_rank=latent,
        qk_rope_head_dim=8,
        layer_num=LAYERS,
        device="cpu",
        index_head_dim=128,
        enable_memory_saver=False,
        index_buf_size=8 * 64,
        skip_topk_layers=skip_topk_layers,
        **{"dtype": torch.float32, "kv_cache_dim": latent + 8, **kwargs},
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("v_head_dim", [8, 4])
def test_mha_pages_are_where_the_map_says(dtype, v_head_dim):
    pool = _mha(dtype=dtype, v_head_dim=v_head_dim)
    memory = memory_of(pool, kv_heads=2)
    itemsize = torch.tensor([], dtype=dtype).element_size()
    assert memory.layout.component_bytes == (
        PAGE * 2 * 8 * itemsize,
        PAGE * 2 * v_head_dim * itemsize,
    )
    for layer in range(LAYERS):
        for component, buffers in enumerate((pool.k_buffer, pool.v_buffer)):
            buffers[layer][2 * PAGE : 3 * PAGE] = 10 * layer + component + 1
            _assert_page(memory, layer, component, page=2, expected=buffers[layer])


def test_mla_pages_are_where_the_map_says():
    pool = _mla()
    memory = memory_of(pool, kv_heads=4)
    assert memory.layout.component_bytes == (PAGE * 24 * 2,)
    for layer in range(LAYERS):
        pool.kv_buffer[layer][2 * PAGE : 3 * PAGE] = layer + 1
        _assert_page(memory, layer, 0, page=2, expected=pool.kv_buffer[layer])


@pytest.mark.parametrize("elides", [False, True], ids=["p", "d"])
def test_index_keys_are_where_the_map_says_and_absent_where_an_indexer_is_shared(elides):
    """P has memory for all layers' (beside a linker), D for those that are written: one layout."""
    pool = _dsa([False, True, False] if elides else None)
    memory = memory_of(pool, kv_heads=2, without_index=(1,))
    assert memory.layout == BlockLayout(64, LAYERS, (64 * 24 * 4, 64 * 132), absent=((), (1,)))
    assert memory.layout.block_bytes == LAYERS * 64 * 24 * 4 + 2 * 64 * 132
    assert memory.has_latents and memory.addresses[1][1] == 0
    for layer in (0, 2):
        pool.index_k_with_scale_buffer[layer][2] = layer + 1
        seen = ctypes.string_at(memory.address(layer, 1, page=2), 64 * 132)
        assert seen == bytes([layer + 1]) * 64 * 132


@pytest.mark.parametrize("elides", [False, True], ids=["p", "d"])
def test_the_layers_of_a_draft_lie_behind_those_of_its_model(elides):
    pool, draft = _dsa([False, True, False] if elides else None), _dsa(None)
    model, of_draft = memory_of(pool, 2, without_index=(1,)), memory_of(draft, 2)
    memory = model.with_draft(of_draft)
    sizes = (64 * 24 * 4, 64 * 132)
    assert memory.layout == BlockLayout(
        64, 2 * LAYERS, sizes, absent=((), (1,)), draft_layers=LAYERS
    )
    assert memory.layout.model_layers == LAYERS and memory.layout.bigrams
    assert memory.layout.shard.draft_layers == LAYERS
    assert memory.addresses == model.addresses + of_draft.addresses
    draft.index_k_with_scale_buffer[2][3] = 7
    seen = ctypes.string_at(memory.address(LAYERS + 2, 1, page=3), 64 * 132)
    assert seen == bytes([7]) * 64 * 132


def test_a_draft_with_other_pages_than_its_model_is_refused():
    wide = memory_of(_mha(), kv_heads=2)
    for other in (_mha(v_head_dim=4), _mha(dtype=torch.bfloat16), _mla()):
        with pytest.raises(UnlikeDraft, match="--speculative-algorithm"):
            wide.with_draft(memory_of(other, kv_heads=2))


def test_noise_is_put_into_all_index_keys_but_those_of_kept_pages():
    buffers = [torch.zeros(4, 64 * 132, dtype=torch.uint8), torch.zeros(0, 1, dtype=torch.uint8)]
    poison_index_keys(buffers, 64 * 128, kept_pages=[2])
    noisy = [page for page in range(4) if buffers[0][page].any()]
    assert noisy == [0, 1, 3]
    assert buffers[0][:, : 64 * 128].view(torch.float8_e4m3fn).float().isfinite().all()
    assert buffers[0][:, 64 * 128 :].view(torch.float32).isfinite().all()


def test_several_tokens_to_an_index_key_are_refused():
    pool = _dsa(None)
    pool.index_kpool = 2
    with pytest.raises(UnsupportedPool, match="share an index key"):
        memory_of(pool, kv_heads=2)


@pytest.mark.parametrize("pool_of", [_mha, _mla])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_mapped_by_its_name_and_its_noise_is_numbers(pool_of, dtype):
    pool = pool_of(dtype=dtype)
    assert memory_of(pool, kv_heads=2).kv_dtype == str(dtype).removeprefix("torch.")
    buffers = pool.k_buffer if pool_of is _mha else pool.kv_buffer
    assert buffers[0].dtype == torch.uint8
    poison(buffers, pool.dtype, PAGE, kept_pages=[])
    noise = numbers_of(pool, buffers[1])
    assert noise.shape == (9 * PAGE, buffers[1][0].numel())
    assert noise.isfinite().all() and noise.std() > 2


def scaled_rows(dtype=torch.float8_e4m3fn):
    """A pool whose latents have a scale for each 128 numbers; of 256, and 8 with a position."""
    return _dsa(None, latent=256, dtype=dtype, kv_cache_dim=256 + 2 * 4 + 8 * 2)


def test_latents_with_scales_in_their_rows_are_moved_as_they_lie():
    memory = memory_of(scaled_rows(), kv_heads=2)
    raw = memory_of(_dsa(None, latent=256, dtype=torch.float8_e4m3fn), kv_heads=2)
    assert memory.layout.component_bytes == (64 * 280, 64 * 132)
    assert raw.layout.component_bytes == (64 * 264, 64 * 132)  # so they are never exchanged
    assert memory.kv_dtype == raw.kv_dtype == "float8_e4m3fn"


def test_numbers_of_latents_with_scales_are_what_was_written():
    from engine.sglang.cpu.sparse.attention import quantized_latents, write_latents

    pool = scaled_rows()
    latents = torch.randn(5, 1, 256) * torch.tensor([0.01, 100.0]).repeat_interleave(128)
    positions, rows = torch.randn(5, 1, 8), torch.arange(64, 69)
    write_latents(pool.kv_buffer[1], rows, *quantized_latents(latents, positions))
    seen = numbers_of(pool, pool.kv_buffer[1][rows])
    assert torch.allclose(seen[:, :256], latents[:, 0], rtol=0.07, atol=1e-4)
    assert torch.equal(seen[:, 256:], positions[:, 0].bfloat16().float())
    poison(pool.kv_buffer, pool.dtype, 64, kept_pages=[])
    assert numbers_of(pool, pool.kv_buffer[1]).isfinite().all()


def test_kv_whose_pages_are_not_token_after_token_is_refused(monkeypatch):
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    with pytest.raises(UnsupportedPool, match=r"token.*\(hnd\)"):
        memory_of(_mha(), kv_heads=2)


def test_scales_of_a_checkpoint_are_part_of_the_format():
    class RadixAttention(torch.nn.Module):
        def __init__(self, k_scale, v_scale):
            super().__init__()
            self.k_scale_float, self.v_scale_float = k_scale, v_scale

    def format_of(*scales):
        layers = torch.nn.ModuleList(RadixAttention(*pair) for pair in scales)
        runner = SimpleNamespace(model=layers)
        worker = SimpleNamespace(model_runner=runner)
        return kv_format(SimpleNamespace(tp_worker=worker, req_to_token_pool=None))

    assert format_of((None, None), (1.0, 1.0)) == {}
    given = [format_of((None, None), (0.5, v)) for v in (1.0, 0.25)]
    assert given[0]["kv_scales"] != given[1]["kv_scales"]


def _assert_page(memory, layer, component, page, expected):
    size = memory.layout.component_bytes[component]
    seen = ctypes.string_at(memory.address(layer, component, page), size)
    rows = expected[page * PAGE : (page + 1) * PAGE].contiguous()
    assert seen == bytes(rows.view(torch.uint8).flatten().tolist())


def test_kv_beside_recurrent_layers_that_cannot_be_stored_is_mapped():
    pool = _mha()
    hybrid = type("HybridLinearKVPool", (), {"full_kv_pool": pool})()
    memory, plain = memory_of(hybrid, 2, unstored="why"), memory_of(pool, kv_heads=2)
    assert memory.addresses == plain.addresses and memory.layout == plain.layout
    assert memory.unstored == "why" and not plain.unstored


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("MHATokenToKVPoolMXFP8", "scales"),
        ("MLATokenToKVPoolFP4", "scales"),
        ("TomorrowsPool", "only .* are known"),
    ],
)
def test_a_pool_with_more_than_plain_kv_is_refused_with_its_name_and_what_is_missing(kind, reason):
    with pytest.raises(UnsupportedPool, match=f"{kind}: .*{reason}"):
        memory_of(type(kind, (), {})(), kv_heads=2)
