"""Attention with windows and sinks on a CPU, number by number. Whole models are compared with
transformers in tests/models."""

from types import SimpleNamespace

import pytest
import torch

from engine.sglang.cpu.windows import around_attention

HEADS, KV_HEADS, NUMBERS, TOKENS = 4, 2, 8, 150
SCALING = NUMBERS**-0.5


class Pool:
    """K and V of both of its layers; the second has rows of its own for windows."""

    def __init__(self, k, v) -> None:
        self.rows, self.window_rows = torch.randperm(190)[:TOKENS], torch.randperm(170)[:TOKENS]
        self.layers_mapping = {0: (0, False), 1: (0, True)}
        self.keys = [torch.full((200, KV_HEADS, NUMBERS), float("nan")) for _ in range(2)]
        self.values = [each.clone() for each in self.keys]
        for layer, rows in enumerate((self.rows, self.window_rows)):
            self.keys[layer][rows], self.values[layer][rows] = k, v

    def translate_loc_from_full_to_swa(self, rows):
        return self.window_rows[(rows[:, None] == self.rows).int().argmax(1)]

    def get_key_buffer(self, layer):
        return self.keys[layer]

    def get_value_buffer(self, layer):
        return self.values[layer]


def attention(layer, new, window, sinks, qkv):
    """Of the last ``new`` tokens, as the backend has it."""
    q, k, v = qkv
    pool = Pool(k, v)
    table = torch.zeros(3, TOKENS, dtype=torch.int32)
    table[2] = pool.rows
    backend = SimpleNamespace(
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        use_sliding_window_kv_pool=True,
    )
    batch = SimpleNamespace(
        seq_lens=torch.tensor([TOKENS]),
        extend_seq_lens=torch.tensor([new]),
        req_pool_indices=torch.tensor([2]),
        forward_mode=SimpleNamespace(
            is_decode_or_idle=lambda: new == 1, is_target_verify=lambda: False
        ),
    )
    of_layer = SimpleNamespace(
        layer_id=layer,
        sliding_window_size=window,
        tp_q_head_num=HEADS,
        qk_head_dim=NUMBERS,
        scaling=SCALING,
    )
    queries = q[-new:].reshape(new, -1)
    return around_attention(None, backend, queries, None, None, of_layer, batch, False, sinks)


def expected(token, window, sinks, qkv):
    """Token by token, head by head."""
    q, k, v = qkv
    first = 0 if window < 0 else max(0, token - window)
    heads = []
    for head in range(HEADS):
        kv_head = head * KV_HEADS // HEADS
        scores = k[first : token + 1, kv_head] @ q[token, head] * SCALING
        at_most = max(scores.max(), sinks[head]) if sinks is not None else scores.max()
        weights = torch.exp(scores - at_most)
        total = weights.sum() + (torch.exp(sinks[head] - at_most) if sinks is not None else 0)
        heads.append(weights / total @ v[first : token + 1, kv_head])
    return torch.cat(heads)


@pytest.mark.parametrize("new", [1, 9, TOKENS])
@pytest.mark.parametrize(("layer", "window"), [(0, -1), (1, 5), (1, 100)])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_a_token_attends_to_its_window_and_the_sinks(new, layer, window, has_sinks):
    if not has_sinks and window < 0:
        pytest.skip("SGLang's own")
    torch.manual_seed(1)
    q = torch.randn(TOKENS, HEADS, NUMBERS)
    k, v = torch.randn(2, TOKENS, KV_HEADS, NUMBERS)
    sinks = torch.randn(HEADS) if has_sinks else None
    out = attention(layer, new, window, sinks, (q, k, v))
    right = [expected(token, window, sinks, (q, k, v)) for token in range(TOKENS - new, TOKENS)]
    torch.testing.assert_close(out, torch.stack(right))


def test_layers_without_either_are_sglangs():
    layer = SimpleNamespace(sliding_window_size=-1)
    assert around_attention(lambda *_: "its own", None, None, None, None, layer, None) == "its own"
