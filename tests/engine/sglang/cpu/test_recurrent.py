"""Recurrences on a CPU: a prompt at once, in pieces, and token by token come to the same. Whole
models are compared with transformers in tests/models."""

import pytest
import torch

from engine.sglang.cpu.recurrent import conv, gdn, kda, mamba

TOKENS, CHUNK, HEADS, GROUPS, NUMBERS, STATE = 50, 8, 4, 2, 6, 5
LENGTHS = (20, 30)
BOUNDS = torch.tensor([0, 20, 50])
SLOTS = torch.tensor([3, 1])


@pytest.fixture(autouse=True)
def _same_numbers():
    torch.manual_seed(1)


def mamba_inputs():
    return {
        "x": torch.randn(TOKENS, HEADS, NUMBERS),
        "dt": torch.randn(TOKENS, HEADS),
        "A": -torch.rand(HEADS),
        "B": torch.randn(TOKENS, GROUPS, STATE),
        "C": torch.randn(TOKENS, GROUPS, STATE),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
    }


def scanned(of, tokens, states, bounds, **more):
    """Output and states at the ends of a batch of requests."""
    x, dt, B, C = (of[name][tokens][None] for name in ("x", "dt", "B", "C"))
    out = torch.empty_like(x)
    result = mamba.scan(
        *(x, dt, of["A"], B, C, CHUNK, of["D"]),
        dt_bias=of["dt_bias"],
        initial_states=states,
        cu_seqlens=torch.tensor(bounds),
        out=out,
        **more,
    )
    return out[0], result


def test_mamba_scans_as_it_steps():
    of = mamba_inputs()
    y, (entering, at_ends, tracked) = scanned(
        of, slice(None), None, [0, *BOUNDS[1:]], track_end_locs=torch.tensor([13, 36])
    )
    pool, end = torch.zeros(4, HEADS, NUMBERS, STATE), 0
    for request, length in enumerate(LENGTHS):
        slot = SLOTS[request : request + 1]
        for token in range(end, end + length):
            if token % CHUNK == 0:
                torch.testing.assert_close(entering[0, token // CHUNK], pool[slot[0]])
            step = torch.empty(1, HEADS, NUMBERS)
            of_token = slice(token, token + 1)
            mamba.step(
                *(pool, of["x"][of_token], of["dt"][of_token, :, None].expand(1, HEADS, NUMBERS)),
                of["A"][:, None, None].expand(HEADS, NUMBERS, STATE),
                *(of["B"][of_token], of["C"][of_token], of["D"][:, None]),
                dt_bias=of["dt_bias"][:, None],
                state_batch_indices=slot,
                out=step,
            )
            torch.testing.assert_close(y[token], step[0])
            if token + 1 in (13, 36):
                torch.testing.assert_close(tracked[0, int(token > 13)], pool[slot[0]])
        torch.testing.assert_close(at_ends[request], pool[slot[0]])
        end += length


def test_mamba_goes_on_from_a_state():
    of = mamba_inputs()
    whole, (_, at_end, _) = scanned(of, slice(None), None, [0, TOKENS])
    first, (_, state, _) = scanned(of, slice(0, 21), None, [0, 21])
    second, (_, same, _) = scanned(of, slice(21, TOKENS), state, [0, TOKENS - 21])
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(same, at_end)


def test_kept_states_are_copies_of_the_slots_asked_for():
    convs, states = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 4)
    before = states.clone()
    wanted, source, target = torch.tensor([True, False]), torch.tensor([1, 2]), torch.tensor([3, 4])
    mamba.keep_states_of_all_layers(convs, states, source, wanted, target, batch_size=2)
    assert torch.equal(states[:, 3], before[:, 1]) and torch.equal(states[:, 4], before[:, 4])
    assert torch.equal(convs[:, 3], convs[:, 1])


def test_a_delta_rule_of_prompts_is_that_of_tokens():
    q, k = torch.randn(2, 1, TOKENS, GROUPS, STATE)
    v, (a, b) = torch.randn(1, TOKENS, HEADS, NUMBERS), torch.randn(2, TOKENS, HEADS)
    of_model = {"A_log": torch.randn(HEADS), "dt_bias": torch.randn(HEADS)}
    g, beta = gdn.gates(of_model["A_log"], a, b, of_model["dt_bias"])
    at_once, one_by_one = (torch.zeros(4, HEADS, NUMBERS, STATE) for _ in range(2))
    slots = {"initial_state_indices": SLOTS}
    y, _, entering = gdn.prompts(
        *(q, k, v, g, beta), initial_state=at_once, cu_seqlens=BOUNDS, **slots
    )
    assert entering.shape == (1, 2, HEADS, NUMBERS, STATE) and not entering.any()
    for request, (start, end) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        for token in range(start, end):
            part = slice(token, token + 1)
            step = gdn.tokens(
                q=q[:, part],
                k=k[:, part],
                v=v[:, part],
                a=a[part],
                b=b[part],
                initial_state_source=one_by_one,
                initial_state_indices=SLOTS[request : request + 1],
                **of_model,
            )
            torch.testing.assert_close(y[:, part], step)
    torch.testing.assert_close(at_once, one_by_one)


def test_kimis_delta_rule_of_prompts_is_that_of_tokens_and_its_states_can_be_kept():
    q, k, a = torch.randn(3, 1, TOKENS, HEADS, STATE)
    v, b = torch.randn(1, TOKENS, HEADS, NUMBERS), torch.randn(1, TOKENS, HEADS)
    of_model = {"A_log": torch.randn(1, 1, HEADS, 1), "dt_bias": torch.randn(HEADS * STATE)}
    start = torch.randn(4, HEADS, NUMBERS, STATE)
    at_once, one_by_one, kept = start.clone(), start.clone(), torch.zeros(2, *start.shape[1:])
    y, entering = kda.prompts(
        *(q, k, v, a, b),
        initial_state=at_once,
        initial_state_indices=SLOTS,
        cu_seqlens=BOUNDS,
        output_intermediate_states=True,
        track_state=kept,
        track_chunk_idx=torch.tensor([-1, 0]),
        **of_model,
    )
    torch.testing.assert_close(entering[0], start[SLOTS])
    assert not kept[0].any() and torch.equal(kept[1], start[SLOTS[1]])
    for request, (begin, end) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        for token in range(begin, end):
            part = slice(token, token + 1)
            step = kda.tokens(
                q=q[:, part],
                k=k[:, part],
                v=v[:, part],
                a=a[0, part].flatten(1),
                b=b[:, part],
                initial_state_source=one_by_one,
                initial_state_indices=SLOTS[request : request + 1],
                **of_model,
            )
            torch.testing.assert_close(y[:, part], step)
    torch.testing.assert_close(at_once, one_by_one)


def test_a_convolution_of_prompts_is_that_of_tokens():
    channels, width = 7, 4
    x, weight, bias = torch.randn(channels, TOKENS), torch.randn(channels, width), torch.randn(7)
    at_once = torch.full((4, channels, width - 1), 9.0)  # an earlier request's
    y = conv.convolve(
        *(x, weight, bias, at_once, BOUNDS),
        cache_indices=SLOTS,
        has_initial_state=torch.tensor([False, False]),
    )
    one_by_one = torch.zeros(4, channels, width - 1)
    for request, (start, end) in enumerate(zip(BOUNDS, BOUNDS[1:], strict=False)):
        slot = SLOTS[request : request + 1]
        for token in range(start, end):
            step = conv.convolve_token(
                *(x[:, token][None], one_by_one, weight, bias, "silu"), conv_state_indices=slot
            )
            torch.testing.assert_close(step[0], y[:, token])
        torch.testing.assert_close(at_once[slot], one_by_one[slot])


def test_a_packed_projection_is_split_by_heads():
    each, keys, values = HEADS // GROUPS, 3, 2
    names = [f"{part}{head}" for head in range(GROUPS) for part in ("q", "k", "v", "z")]
    widths = {"q": keys, "k": keys, "v": each * values, "z": each * values}
    parts = {name: torch.randn(2, widths[name[0]]) for name in names}
    b, a = torch.randn(2, 2, HEADS)
    packed_ba = torch.cat(
        [t[:, g * each : (g + 1) * each] for g in range(GROUPS) for t in (b, a)], 1
    )
    packed = torch.cat([parts[name] for name in names], 1)
    qkv, z, same_b, same_a = gdn.split(packed, packed_ba, GROUPS, HEADS, keys, values)
    by_kind = [parts[f"{kind}{head}"] for kind in "qkv" for head in range(GROUPS)]
    assert torch.equal(qkv, torch.cat(by_kind, 1))
    assert torch.equal(z.flatten(1), torch.cat([parts["z0"], parts["z1"]], 1))
    assert torch.equal(same_b, b) and torch.equal(same_a, a)
