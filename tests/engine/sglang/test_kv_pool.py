"""The KV memory map agrees with SGLang's own pools, byte by byte."""

import ctypes

import pytest
import torch

from engine.sglang.kv_pool import UnsupportedPool, memory_of

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


def _mla():
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    return MLATokenToKVPool(
        size=8 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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


def _assert_page(memory, layer, component, page, expected):
    size = memory.layout.component_bytes[component]
    seen = ctypes.string_at(memory.address(layer, component, page), size)
    rows = expected[page * PAGE : (page + 1) * PAGE].contiguous()
    assert seen == bytes(rows.view(torch.uint8).flatten().tolist())


def test_a_pool_with_more_than_plain_kv_is_refused_with_its_name():
    class SlidingWindowPool:
        pass

    with pytest.raises(UnsupportedPool, match="SlidingWindowPool"):
        memory_of(SlidingWindowPool(), kv_heads=2)
