"""A decode engine's part in SGLang's digests of what P sends."""

from __future__ import annotations

import ctypes
import zlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from common.messages.from_engines import PullBlocks
from engine import runtime
from engine.sglang.cpu.fixes import digest_of_pages
from engine.sglang.decode import checksum_hooks
from tests.engine.decode.queues import DecodeParts, Queues
from tests.engine.parts import PAGE, Request
from tests.samples import by_name

PROMPT = list(range(100, 118))  # four blocks and two tokens


@pytest.fixture
def parts(monkeypatch) -> tuple[DecodeParts, Queues]:
    engine = DecodeParts()
    monkeypatch.setattr(runtime, "_runtime", engine)
    return engine, Queues(engine)


def test_what_is_digested_begins_behind_the_promised_prefix(parts):
    """As at P; SGLang would begin where the tree's part ends."""
    engine, queues = parts
    request = Request("r", PROMPT)
    engine.plan(request, 3)
    queues.admit(request, cached_tokens=PAGE)
    digested: list[tuple[int, int]] = []

    def original(scheduler, req, end_idx, start_idx):
        digested.append((start_idx, end_idx))

    start = request.kv.cache_protected_len
    checksum_hooks.around_page_indices(original, None, request, 18, start_idx=start)
    assert (start, digested) == (PAGE, [(3 * PAGE, 18)])
    plain = Request("s", PROMPT)
    checksum_hooks.around_page_indices(original, None, plain, 18, start_idx=PAGE)
    assert digested[1:] == [(PAGE, 18)]


def test_a_request_whose_kv_is_not_what_p_sent_is_counted_and_not_stored(parts):
    engine, queues = parts
    request = Request("r", PROMPT)
    queues.commit(queues.admit(request))
    checksum_hooks.before_mismatch(None, request, "KV checksum mismatch")
    request.finished_reason = "aborted"
    queues.join_batch(request)
    assert engine.links.of(PullBlocks) == []
    counted = by_name(engine.restores.samples())
    assert counted == {"dualpath:engine_kv_checksum_mismatches_total": 1}


@pytest.mark.parametrize("expected, is_kept", [(7, False), (0, True)])
def test_nothing_is_kept_of_a_request_aborted_before_its_digest_was_looked_at(
    parts, expected, is_kept
):
    engine, queues = parts
    request = Request("r", PROMPT)
    request.expected_kv_checksum, request.skip_radix_cache_insert = expected, False
    queues.commit(queues.admit(request))
    checksum_hooks.before_release_aborted(None, request)
    request.finished_reason = "aborted"
    assert request.skip_radix_cache_insert is not is_kept
    queues.join_batch(request)  # SGLang's checkpoint
    assert bool(engine.links.of(PullBlocks)) == is_kept


def test_on_a_cpu_the_digest_is_adler_32_of_the_pages_of_all_buffers():
    buffers = [bytes(range(64)), bytes(range(64, 128))]
    kept = [ctypes.create_string_buffer(buffer, 64) for buffer in buffers]
    computer = SimpleNamespace(
        _kv_data_ptrs=[ctypes.addressof(buffer) for buffer in kept], _kv_item_lens=[16, 16]
    )
    digest = digest_of_pages(cast(Any, computer), torch.tensor([2, 0]))
    assert digest == zlib.adler32(b"".join(b[32:48] + b[:16] for b in buffers))
