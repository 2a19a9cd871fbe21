"""What a prefill engine measures of its own forwards, and makes of a profile."""

from __future__ import annotations

import time
from types import SimpleNamespace

import msgspec
import pytest

from common.user_files import keep
from engine.prefill.forward_clock import ForwardClock, ForwardSample, Waits
from engine.prefill.timing import PrefillTiming, QuotaUnusable
from tests.engine.parts import Parts
from tests.samples import by_name

PAGE = 64


def forward_batch(new=(100, 30), context=(0, 640), extends=True):
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extends),
        extend_seq_lens_cpu=list(new),
        extend_prefix_lens_cpu=list(context),
    )


def busy(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_attention_is_a_part_of_the_forward_and_waiting_is_no_part_of_either():
    deliveries, seen = Parts("prefill").deliveries, []
    clock = ForwardClock(None, deliveries.waits, lambda seconds: seconds, seen.append)

    def layer():
        with deliveries.waiting(0):
            time.sleep(0.05)
            busy(0.03)  # polling
        busy(0.02)

    def forward():
        for _ in range(2):
            busy(0.01)
            clock.attention(layer)
        return "logits"

    assert clock.forward(forward, forward_batch()) == "logits"
    (sample,) = seen
    assert (sample.new_tokens, sample.context_tokens) == ([100, 30], [0, 640])
    assert 0.04 <= sample.attention_s < 0.055
    assert sample.attention_s + 0.015 < sample.forward_s
    assert deliveries.waits().wall_s >= 0.16 and deliveries.waits().cpu_s >= 0.06


def test_attention_that_hands_over_to_another_backend_counts_once():
    seen = []
    clock = ForwardClock(None, Waits, lambda seconds: seconds, seen.append)
    inner = lambda: clock.attention(lambda: busy(0.02))  # noqa: E731
    clock.forward(lambda: clock.attention(inner), forward_batch())
    assert 0.02 <= seen[0].attention_s < 0.035


def test_forwards_of_no_prompt_and_attention_outside_of_one_are_only_run():
    seen = []
    clock = ForwardClock(None, Waits, lambda seconds: seconds, seen.append)
    assert clock.forward(lambda: 1, forward_batch(extends=False)) == 1
    assert clock.attention(lambda: 2) == 2
    assert seen == []


def test_the_ranks_of_an_engine_reckon_with_the_slowest():
    seen = []
    clock = ForwardClock(None, Waits, lambda seconds: [9.0, 8.0], seen.append)
    clock.forward(lambda: None, forward_batch())
    assert (seen[0].forward_s, seen[0].attention_s) == (9.0, 8.0)


# ---- the profile ------------------------------------------------------------------------

SAMPLES = [
    ForwardSample([new], [context], 0.01 + 1e-7 * new * (context + new), 1e-7 * new * context)
    for new in (64, 256, 1024)
    for context in (256, 1024, 4096)
]


def scheduler(chunk_tokens: int | None = 8192) -> SimpleNamespace:
    pool = SimpleNamespace(layer_transfer_counter=None)
    return SimpleNamespace(
        device="cpu",
        chunked_prefill_size=chunk_tokens,
        sliding_window_size=None,
        model_config=SimpleNamespace(dtype="float32"),
        server_args=SimpleNamespace(
            tp_size=1, attn_dp_size=1, kv_cache_dtype="auto", attention_backend="native"
        ),
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
    )


@pytest.fixture
def profile(monkeypatch, tmp_path):
    """Path of the profile that an engine on this machine would read."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
    from engine.prefill import profile as prefill_profile
    from engine.sglang.prefill.made_up_forwards import MadeUpForwards

    def not_now(*_):
        raise AssertionError("the kept profile was not read")

    monkeypatch.setattr(prefill_profile, "take", not_now)
    return prefill_profile.profile_path(MadeUpForwards(scheduler()), "a model")


def test_a_kept_profile_is_read_and_packs(profile):
    keep(profile, msgspec.json.encode(SAMPLES))
    timing = PrefillTiming(scheduler(), 0.3)
    timing.start_quota("a model", PAGE)
    # 1e-7 s a pair with the prefix: 0.3 s are 732 tokens after 4096.
    assert timing.quota.new_batch().room(4096, 10_000) == pytest.approx(732, abs=PAGE)
    assert by_name(timing.samples())["dualpath:engine_quota_batches_total"] == 0


def test_another_model_or_an_unreadable_file_is_profiled_anew(profile):
    keep(profile, b"[{")
    with pytest.raises(AssertionError, match="not read"):
        PrefillTiming(scheduler(), 0.3).start_quota("a model", PAGE)
    keep(profile, msgspec.json.encode(SAMPLES))
    with pytest.raises(AssertionError, match="not read"):
        PrefillTiming(scheduler(), 0.3).start_quota("another model", PAGE)


def test_an_engine_that_cannot_pack_says_what_to_change(profile):
    with pytest.raises(QuotaUnusable, match="--chunked-prefill-size"):
        PrefillTiming(scheduler(chunk_tokens=None), 0.3).start_quota("a model", PAGE)
    unseen = [msgspec.structs.replace(sample, attention_s=0.0) for sample in SAMPLES]
    keep(profile, msgspec.json.encode(unseen))
    with pytest.raises(QuotaUnusable, match="--cuda-graph-backend-prefill disabled"):
        PrefillTiming(scheduler(), 0.3).start_quota("a model", PAGE)


def test_without_a_quota_nothing_is_profiled(profile):
    timing = PrefillTiming(scheduler(), None)
    timing.start_quota("a model", PAGE)
    assert timing.quota is None
    assert not [name for name in by_name(timing.samples()) if "quota" in name]


def test_forwards_are_counted_by_the_same_clock_that_the_costs_are_fitted_to():
    timing = PrefillTiming(scheduler(), None)
    timing.clock.forward(lambda: busy(0.02), forward_batch())
    timing.clock.forward(lambda: busy(0.02), forward_batch(new=(5,), context=(0,)))
    counted = by_name(timing.samples())
    assert counted["dualpath:engine_forwards_total"] == 2
    assert counted["dualpath:engine_forward_requests_max"] == 2
    assert counted["dualpath:engine_forward_seconds_total"] >= 0.04
