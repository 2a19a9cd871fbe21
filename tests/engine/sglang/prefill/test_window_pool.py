"""A pool of a layer window has fewer buffers than layers, and counts them once."""

from types import SimpleNamespace

import pytest
import torch

from engine.sglang.prefill import window_pool
from engine.sglang.prefill.window_pool import after_cell_size, after_kv_size

PLAIN = SimpleNamespace(
    model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"]))
)


@pytest.fixture
def window(monkeypatch):
    monkeypatch.setattr(window_pool, "_window_of", lambda layers: 3 if layers > 3 else 0)


def create(layers):
    pool = SimpleNamespace(layer_num=layers, k_buffer=None, v_buffer=None)

    def original(pool):
        pool.k_buffer = [torch.zeros(4, 2) for _ in range(pool.layer_num)]
        pool.v_buffer = [torch.zeros(4, 2) for _ in range(pool.layer_num)]

    window_pool.around_create_buffers(original, pool)
    return pool


def test_a_pool_has_w_buffers_under_the_names_of_all_layers(window):
    pool = create(8)
    assert pool.layer_num == 8 and len(pool.k_buffer) == len(pool.v_buffer) == 8
    assert len({b.data_ptr() for b in pool.k_buffer + pool.v_buffer}) == 6
    assert all(pool.k_buffer[layer] is pool.k_buffer[layer % 3] for layer in range(8))
    assert after_kv_size((800, 800), pool) == (300, 300)
    assert after_kv_size(800, pool) == 300
    assert after_cell_size(800, None, PLAIN, 8) == 300
    assert after_cell_size(801, None, PLAIN, 8) == 301


def test_index_keys_are_kept_of_all_layers(window):
    sparse = SimpleNamespace(architectures=["DeepseekV32ForCausalLM"], index_topk=64)
    kvc = SimpleNamespace(model_config=SimpleNamespace(hf_config=sparse))
    configurator = SimpleNamespace(_compute_dsa_indexer_cell_size=lambda kvc, num_layers: 132 * 8)
    assert after_cell_size(132 * 8 + 800, configurator, kvc, 8) == 132 * 8 + 300


def test_a_model_with_no_more_layers_keeps_them_all(window):
    pool = create(3)
    assert len({b.data_ptr() for b in pool.k_buffer}) == 3
    assert after_kv_size((9, 9), pool) == (9, 9) and after_cell_size(9, None, None, 3) == 9
