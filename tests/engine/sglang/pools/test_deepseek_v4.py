"""DeepSeek-V4's pool of SGLang: a block's addresses agree with it, byte by byte."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from engine.sglang.kv_pool import UnsupportedPool, memory_of
from engine.sglang.pools import deepseek_v4
from engine.sglang.pools.packed_rows import (
    read_keys,
    read_latents,
    round_trip,
    round_trip_keys,
    write_keys,
    write_latents,
)

PAGE, PAGES = 256, 4
RATIOS = [0, 4, 128, 4]


class Flags(SimpleNamespace):
    """SGLang's, of which none is set."""

    def __getattr__(self, name):
        return None


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
    from sglang.srt.mem_cache import deepseek_v4_memory_pool as module

    kernel = Flags(dsv4_attn_backend="flashmla")
    monkeypatch.setattr(module, "get_spec", Flags)
    monkeypatch.setattr(
        module, "get_exec", lambda: Flags(kernel=kernel, features=Flags(), graph=Flags())
    )
    size = PAGE * PAGES
    return module.DeepSeekV4TokenToKVPool(
        max_num_reqs=2,
        swa_size=size,
        c4_size=size // 4,
        c128_size=size // 128,
        c4_state_pool_size=PAGES * 8,
        c128_state_pool_size=2 * 128,
        page_size=PAGE,
        swa_page_size=PAGE,
        dtype=torch.float8_e4m3fn,
        c4_state_dtype=torch.float32,
        c128_state_dtype=torch.float32,
        qk_nope_head_dim=448,
        qk_rope_head_dim=64,
        indexer_head_dim=128,
        layer_num=len(RATIOS),
        device="cpu",
        enable_memory_saver=False,
        compression_ratios=RATIOS,
        sliding_window=128,
    )


def test_every_component_of_a_page_is_where_the_pool_has_it(pool):
    memory = memory_of(pool, kv_heads=1, window_tokens=PAGE)
    (window,) = memory.parts
    assert [memory.layout.sizes(layer) for layer in range(4)] == [
        (0, 0, 0),
        (37_440, 8_448, 0),
        (0, 0, 1_728),
        (37_440, 8_448, 0),
    ]
    assert [window.part.layout.sizes(layer) for layer in range(4)] == [
        (149_760, 0, 0),
        (149_760, 65_536, 16_384),
        (149_760, 0, 0),
        (149_760, 65_536, 16_384),
    ]
    assert window.part.span_pages == 1
    latents = pool.get_extra_key_buffer(3)[2].view(torch.uint8)
    assert bytes_at(memory.address(3, 0, 2), 37_440) == filled(latents)
    keys = pool.get_index_k_with_scale_buffer(3)[1]
    assert bytes_at(memory.address(3, 1, 1), 8_448) == filled(keys)
    of_128 = pool.get_extra_key_buffer(2)[3].view(torch.uint8)
    assert bytes_at(memory.address(2, 2, 3), 1_728) == filled(of_128)
    in_window = pool.get_swa_key_buffer_radix(0)[2].view(torch.uint8)
    assert bytes_at(window.addresses[0][0] + 2 * 149_760, 149_760) == filled(in_window)
    for component, states, size in (
        (1, pool.get_attention_compress_states(1), 65_536),
        (2, pool.get_indexer_compress_states(1), 16_384),
    ):
        # The last tokens of a page of the window's, whose states a next page needs.
        rows = states.translate_from_swa_loc_to_state_loc(torch.arange(2 * PAGE - 8, 2 * PAGE))
        values = states.kv_score_buffer.kv_score[rows[0] : rows[-1] + 1].view(torch.uint8)
        assert bytes_at(window.addresses[1][component] + size, size) == filled(values)


def filled(buffer: torch.Tensor) -> bytes:
    """Writes other bytes into each page, and says which."""
    values = torch.randint(0, 256, (buffer.numel(),), dtype=torch.uint8)
    buffer.copy_(values.view(buffer.shape))
    return values.numpy().tobytes()


def bytes_at(address: int, size: int) -> "Lazy":
    return Lazy(address, size)


class Lazy:
    """Memory that is read when it is compared."""

    def __init__(self, address: int, size: int) -> None:
        self.address, self.size = address, size

    def __eq__(self, other: object) -> bool:
        return ctypes.string_at(self.address, self.size) == other


def test_state_of_groups_of_128_is_in_no_page(pool):
    """And none is needed where a page ends."""
    memory = memory_of(pool, kv_heads=1, window_tokens=PAGE)
    of_requests = {
        states.kv_score_buffer.kv_score.data_ptr()
        for states in pool.compress_state_pools
        if states is not None and states.request_scoped
    }
    assert of_requests and not of_requests & memory.bases
    assert len(pool.request_state_transfer_indices(1, PAGE)) == 0
    assert len(pool.request_state_transfer_indices(1, PAGE + 44)) == 1


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda pool: setattr(pool, "swa_req_ring_size", 128), "by request"),
        (lambda pool: setattr(pool, "request_window", object()), "by request"),
        (lambda pool: setattr(pool, "kv_layout", type(pool.kv_layout).V41), "packed otherwise"),
        (lambda pool: setattr(pool, "uniform_fp8", True), "packed otherwise"),
        (lambda pool: setattr(pool, "compression_ratios", [0, 4, 2, 4]), "groups"),
        (lambda pool: setattr(pool.index_pools[4], "use_fp4_indexer", True), "4 bits"),
        (lambda pool: setattr(pool.compress_state_pools[2], "online", True), "running sums"),
        (lambda pool: setattr(pool, "swa_page_size", 128), "another size"),
    ],
)
def test_other_layouts_are_refused_by_name(pool, change, why):
    change(pool)
    with pytest.raises(UnsupportedPool, match=f"DeepSeekV4TokenToKVPool: .*{why}"):
        memory_of(pool, kv_heads=1, window_tokens=PAGE)


def test_noise_spares_pages_that_are_being_read(pool):
    memory = memory_of(pool, kv_heads=1, window_tokens=PAGE)
    swa, latents = pool.get_swa_key_buffer_radix(1), pool.get_extra_key_buffer(1)
    states = pool.get_attention_compress_states(1).kv_score_buffer.kv_score
    states.zero_()
    deepseek_v4.poison(pool, kept_pages=[1], kept_windows=[2])
    swa, latents = swa.view(torch.uint8), latents.view(torch.uint8)
    assert not latents[1].any() and latents[2].any()
    assert not swa[2].any() and swa[1].any()
    assert not states[16:24].any() and states[8:16].any()
    assert deepseek_v4.bytes_of(pool) > memory.layout.block_bytes * PAGES


def test_latents_are_packed_as_flash_mla_reads_them():
    """A power of two for each 64 numbers, the least with which they fit; positions in bfloat16."""
    latents = torch.zeros(2, 512)
    latents[0, 0], latents[0, 64], latents[0, 65], latents[0, -1] = 448, 449, 1.3, 1.003
    buffer = torch.zeros(2, 576 * 3, dtype=torch.uint8)  # of two rows and their scales, padded
    write_latents(buffer, 2, torch.tensor([3, 0]), latents)
    row, exponents = buffer[1, 576:1152], buffer[1, 1152 + 8 : 1152 + 16]
    assert exponents.tolist()[:2] == [127, 128] and exponents[7] == 0
    numbers = row[:448].view(torch.float8_e4m3fn).float()
    assert numbers[[0, 64, 65]].tolist() == [448, 224, 0.625]
    assert row[448:].view(torch.bfloat16)[-1] == torch.tensor(1.003, dtype=torch.bfloat16)
    assert read_latents(buffer, 2, torch.tensor([3]))[0].equal(round_trip(latents)[0])


def test_what_is_read_is_near_to_what_was_written():
    latents, keys = torch.randn(8, 512) * 5, torch.randn(8, 128)
    rows = torch.randperm(16)[:8]
    buffer = torch.zeros(4, 576 * 5, dtype=torch.uint8)
    write_latents(buffer, 4, rows, latents)
    assert read_latents(buffer, 4, rows).equal(round_trip(latents))
    torch.testing.assert_close(round_trip(latents), latents, rtol=0.07, atol=0.02)
    buffer = torch.zeros(4, 132 * 4, dtype=torch.uint8)
    write_keys(buffer, 4, rows, keys)
    assert read_keys(buffer, 4, rows).equal(round_trip_keys(keys))
    torch.testing.assert_close(round_trip_keys(keys), keys, rtol=0.07, atol=0.02)
