"""The suffix leaves layer by layer, all of it, once; what goes wrong ends its own request."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.base.conn import StateType

from engine.page_table import PageTable
from engine.prefill.forwards import PrefillForward
from engine.prefill.layer_copies import LayerCopies
from engine.prefill.suffix_send import SuffixSender
from engine.sglang.prefill import send_hooks
from engine.sglang.prefill.send_manager import SendManager
from engine.streams import Streams
from tests.engine.prefill.sends import (
    LAYERS,
    PAGE,
    PAGE_BYTES,
    SESSION,
    FakeManager,
    arrived,
    request,
)


@pytest.fixture
def manager():
    return FakeManager()


@pytest.fixture
def sender(manager):
    view = SendManager(manager)
    table = PageTable(manager.req_to_token, PAGE)
    return SuffixSender(view, LayerCopies(view, LAYERS, range(LAYERS)), table)


def followed(sender, *requests, num_layers=LAYERS, draft_layers=0):
    """A forward; the workers' calls run at once."""
    workers = SimpleNamespace(submit=lambda session, call: call())
    forwards: Any = SimpleNamespace(
        suffix=sender,
        workers=workers,
        num_layers=num_layers,
        model_layers=num_layers - draft_layers,
        one_call_a_layer=True,
        unseen_layers_total=0,
        streams=Streams(),
    )
    return PrefillForward(forwards, sender.plan(requests))


def forward(sender, *requests, num_layers=LAYERS):
    """Run all layers of a forward."""
    run = followed(sender, *requests, num_layers=num_layers)
    for layer in range(num_layers):
        run.before_attention(layer)
        run.after_attention(layer)
    run.finish()


def test_a_suffix_arrives_and_claims_all_of_sglangs_own_send(manager, sender):
    req = request(manager, 7, tokens=10, src_pages=[3, 9, 4, 5], dst_pages=[8, 1, 2])
    forward(sender, req)
    assert arrived(manager, [3, 9, 4], [8, 1, 2])
    sends = sender.claim(7, pages=3, is_last=True)
    assert sends is not None and all(send.done.is_set() for send in sends)
    sender.settle(7, sends)
    assert not manager.concluded and not sender.is_in_flight(7)


def test_index_keys_leave_with_their_layer_and_are_not_sent_again(manager, sender, monkeypatch):
    """Of sparse attention; the last layer shares an indexer, and D has no memory for its keys."""
    manager.give_index_keys(without={LAYERS - 1})
    forward(sender, request(manager, 7, 12, [3, 9, 4], dst_pages=[8, 1, 2]))
    assert arrived(manager, [3, 9, 4], [8, 1, 2])
    for layer, (own, peer) in enumerate(zip(manager.own_index, manager.peer_index, strict=True)):
        own, peer = own.reshape(-1, PAGE_BYTES), peer.reshape(-1, PAGE_BYTES)
        assert np.array_equal(own[[3, 9, 4]], peer[[8, 1, 2]]) == (layer < LAYERS - 1)
    assert manager.writes == LAYERS, "one batch a layer"
    followed = SimpleNamespace(suffix=sender, window=None)
    monkeypatch.setattr(send_hooks, "forwards", lambda: followed)
    left = []
    send_hooks.around_add_transfer(
        lambda *arguments, **_: left.append(arguments),
        *(manager, 7, np.array([3, 9, 4]), slice(0, 3), True),
        aux_index=1,
        state_indices=[[3, 9, 4]],
    )
    ((_, _, pages, _, _, aux_index, state_indices),) = left
    assert len(pages) == 0 and aux_index == 1 and state_indices is None


def test_layers_with_windows_are_left_to_sglangs_last_send(manager, monkeypatch):
    """They have no KV, and no buffer among those of the layers that have."""
    manager.kv_args.state_types = [StateType.SWA]
    manager.decode_kv_args_table[SESSION].dst_state_data_ptrs = [[1]]
    view = SendManager(manager)
    copies = LayerCopies(view, 2 * LAYERS, range(1, 2 * LAYERS, 2))
    sender = SuffixSender(view, copies, PageTable(manager.req_to_token, PAGE))
    req = request(manager, 7, 12, [3, 9, 4], dst_pages=[8, 1, 2])
    forward(sender, req, num_layers=2 * LAYERS)
    assert arrived(manager, [3, 9, 4], [8, 1, 2]) and manager.writes == LAYERS
    monkeypatch.setattr(send_hooks, "forwards", lambda: SimpleNamespace(suffix=sender, window=None))
    left = []
    send_hooks.around_add_transfer(
        lambda *arguments, **_: left.append(arguments),
        *(manager, 7, np.array([3, 9, 4]), slice(0, 3), True),
        state_indices=[[5, 6]],
    )
    ((_, _, pages, _, _, _, state_indices),) = left
    assert len(pages) == 0 and state_indices == [[5, 6]]


def test_a_draft_leaves_when_it_has_run_and_its_buffers_are_found_behind_the_models(
    manager, sender
):
    """Of a model of two layers (K, K, V, V) and a draft of one (K, V)."""
    order = [0, 1, 3, 4, 2, 5]
    manager.own, manager.peer = ([of[i] for i in order] for of in (manager.own, manager.peer))
    manager.kv_args.kv_data_ptrs = [b.ctypes.data for b in manager.own]
    manager.decode_kv_args_table[SESSION].dst_kv_ptrs = [b.ctypes.data for b in manager.peer]
    manager.kv_args.num_draft_entries = 2
    run = followed(sender, request(manager, 7, 8, [3, 9], dst_pages=[8, 1]), draft_layers=1)
    for layer in range(LAYERS - 1):
        run.before_attention(layer)
        run.after_attention(layer)
    own, peer = (of[4].reshape(-1, PAGE_BYTES) for of in (manager.own, manager.peer))
    assert manager.writes == LAYERS - 1 and not np.array_equal(own[[3, 9]], peer[[8, 1]])
    run.before_attention(0)  # the draft's only layer
    own[[3, 9]] = 7
    run.after_attention(0)
    run.finish()
    assert manager.writes == LAYERS and arrived(manager, [3, 9], [8, 1])


def test_what_the_decode_engine_has_is_not_sent(manager, sender):
    before = [b.copy() for b in manager.peer]
    req = request(manager, 7, 16, [3, 4, 5, 6], dst_pages=[20, 21], prefix_pages=2)
    forward(sender, req)
    assert arrived(manager, [5, 6], [20, 21])
    assert sender.copies.moved_bytes() == {("write", "d0"): 2 * 2 * LAYERS * PAGE_BYTES}
    for old, new in zip(before, manager.peer, strict=True):
        changed = (old != new).reshape(-1, PAGE_BYTES).any(axis=1)
        assert set(np.flatnonzero(changed)) <= {20, 21}


def test_chunks_send_each_page_once_and_a_partial_page_with_the_chunk_that_fills_it(
    manager, sender
):
    req = request(manager, 7, 14, [3, 4, 5, 6], dst_pages=[20, 21, 22, 23], extend_end=6)
    forward(sender, req)
    assert arrived(manager, [3], [20]) and not arrived(manager, [4], [21])
    first = sender.claim(7, pages=1, is_last=False)
    assert [send.src.get().tolist() for send in first] == [[3]]
    req.extend_end = 14
    forward(sender, req)
    assert arrived(manager, [3, 4, 5, 6], [20, 21, 22, 23])
    rest = sender.claim(7, pages=4, is_last=True)
    assert [send.src.get().tolist() for send in rest] == [[4, 5, 6]]


def test_requests_to_one_decode_engine_share_a_write_for_each_layer(manager, sender):
    a = request(manager, 7, 8, [3, 4], [8, 9])
    b = request(manager, 8, 8, [5, 6], [10, 11])
    forward(sender, a, b)
    assert manager.writes == LAYERS
    assert arrived(manager, [3, 4, 5, 6], [8, 9, 10, 11])


def test_a_failed_write_fails_its_rooms_as_sglang_does(manager, sender):
    manager.code = -1
    req = request(manager, 7, 8, [3, 4], [8, 9])
    forward(sender, req)
    sends = sender.claim(7, pages=2, is_last=True)
    sender.settle(7, sends)
    assert "not sent" in manager.concluded[7]
    assert manager.failed_sessions == {SESSION} and manager.poisoned == [7]


def test_an_aborted_request_is_acknowledged_only_when_its_layers_are_through(manager, sender):
    req = request(manager, 7, 8, [3, 4], [8, 9])
    sends = sender.plan([req])[SESSION]
    sender.send_layer(SESSION, sends, 0)
    manager.request_status[7] = KVPoll.Failed
    assert sender.is_in_flight(7) and not manager.acked
    writes = manager.writes
    for layer in range(1, LAYERS):
        sender.send_layer(SESSION, sends, layer)
    assert manager.writes == writes, "nothing more is written for it"
    assert manager.acked == [7] and not sender.is_in_flight(7)


@pytest.mark.parametrize("changed", ["dst_kv_item_len", "requires_dcp_relayout", "unknown"])
def test_another_layout_is_left_to_sglang(manager, sender, changed):
    req = request(manager, 7, 8, [3, 4], [8, 9])
    if changed == "unknown":
        manager.decode_kv_args_table.clear()
    else:
        setattr(manager.decode_kv_args_table[SESSION], changed, PAGE_BYTES // 2)
    forward(sender, req)
    assert manager.writes == 0 and sender.claim(7, 2, is_last=True) is None


def test_pages_that_no_forward_planned_are_left_to_sglang(manager, sender):
    req = request(manager, 7, 8, [3, 4], [8, 9], extend_end=4)
    forward(sender, req)
    assert sender.claim(7, pages=2, is_last=True) is None


@pytest.mark.parametrize("has_window", [True, False])
def test_what_left_a_layer_window_unsent_ends_its_request(manager, sender, monkeypatch, has_window):
    """Its buffers have other layers' KV by now: SGLang must not send them."""
    forwards = SimpleNamespace(suffix=sender, window=object() if has_window else None)
    monkeypatch.setattr(send_hooks, "forwards", lambda: forwards)
    req = request(manager, 7, 8, [3, 4], [8, 9])
    manager.decode_kv_args_table[SESSION].dst_kv_item_len = PAGE_BYTES // 2
    forward(sender, req)
    sent = []

    def original(manager, room, kv_indices, *_, **__):
        sent.append(kv_indices.tolist())

    pages = np.array([3, 4])
    send_hooks.around_add_transfer(original, manager, 7, pages, slice(0, 2), True)
    assert sent == ([] if has_window else [[3, 4]])
    assert ("--tp" in manager.concluded.get(7, "")) == has_window
