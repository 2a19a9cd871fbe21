"""The suffix leaves layer by layer, all of it, once; what goes wrong ends its own request."""

import ctypes
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.disaggregation.base import KVPoll

from engine.page_table import PageTable
from engine.prefill.forwards import PrefillForward
from engine.prefill.layer_copies import LayerCopies
from engine.prefill.suffix_send import SuffixSender
from engine.sglang.prefill import send_hooks
from engine.sglang.prefill.send_manager import SendManager

PAGE = 4
LAYERS = 3
ROW_BYTES = 8
PAGE_BYTES = PAGE * ROW_BYTES
SESSION = "d0:1"


def pool(pages: int, seed: int) -> list[np.ndarray]:
    """K and V buffers, K of all layers first."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, pages * PAGE_BYTES, np.uint8) for _ in range(2 * LAYERS)]


class FakeManager:
    """What is used of SGLang's MooncakeKVManager; a write is a memcpy."""

    def __init__(self) -> None:
        self.own, self.peer = pool(32, seed=1), pool(32, seed=2)
        self.kv_args = SimpleNamespace(
            kv_data_ptrs=[b.ctypes.data for b in self.own],
            kv_item_lens=[PAGE_BYTES] * 2 * LAYERS,
        )
        self.decode_kv_args_table = {
            SESSION: SimpleNamespace(
                dst_kv_ptrs=[b.ctypes.data for b in self.peer],
                dst_kv_item_len=PAGE_BYTES,
                requires_dcp_relayout=False,
            )
        }
        self.transfer_infos, self.request_status = {}, {}
        self.session_lock = threading.Lock()
        self.session_failures, self.failed_sessions = defaultdict(int), set()
        self.failed_session_probes = {}
        self.engine = SimpleNamespace(engine=self, hostname="p0")
        self.code = 0
        self.writes = 0
        self.concluded, self.poisoned, self.acked = {}, [], []
        self.req_to_token = torch.zeros((4, 128), dtype=torch.int32)

    def batch_transfer_async_write(self, *_):
        return 0  # not taken: then the synchronous call is made

    def batch_transfer_sync_write(self, session, src, dst, lengths):
        self.writes += 1
        for a, b, length in zip(src, dst, lengths, strict=True):
            if self.code == 0:
                ctypes.memmove(b, a, length)
        return self.code

    def check_status(self, room):
        return self.request_status[room]

    def conclude_failure(self, *, bootstrap_room, failure_reason):
        self.request_status[bootstrap_room] = KVPoll.Failed
        self.concluded[bootstrap_room] = failure_reason

    def _poison_unsettled_send(self, room):
        self.poisoned.append(room)

    def _maybe_ack_drained_abort(self, room):
        self.acked.append(room)


@pytest.fixture
def manager():
    return FakeManager()


@pytest.fixture
def sender(manager):
    view = SendManager(manager)
    table = PageTable(manager.req_to_token, PAGE)
    return SuffixSender(view, LayerCopies(view, LAYERS), table)


def request(manager, room, tokens, src_pages, dst_pages, prefix_pages=0, **changes):
    """A request whose D has ``prefix_pages`` and gave ``dst_pages`` for the rest."""
    index = len(manager.transfer_infos)
    rows = np.concatenate([np.arange(PAGE) + PAGE * page for page in src_pages])
    manager.req_to_token[index, : len(rows)] = torch.from_numpy(rows)
    info = SimpleNamespace(
        is_dummy=False,
        mooncake_session_id=SESSION,
        dst_kv_indices=np.array(dst_pages, np.int32),
        dst_device_kv_indices=None,
    )
    manager.transfer_infos[room] = {SESSION: info}
    manager.request_status[room] = KVPoll.Transferring
    fields = {
        "disagg_kv_sender": object(),
        "pending_bootstrap": False,
        "bootstrap_room": room,
        "disagg_decode_prefix_len": prefix_pages * PAGE,
        "origin_input_ids": list(range(tokens)),
        "extend_end": tokens,
        "kv": SimpleNamespace(req_pool_idx=index),
    }
    return SimpleNamespace(**(fields | changes))


def forward(sender, *requests):
    """Run all layers of a forward; the workers' calls run at once."""
    workers = SimpleNamespace(submit=lambda session, call: call())
    forwards: Any = SimpleNamespace(
        suffix=sender,
        workers=workers,
        num_layers=LAYERS,
        one_call_a_layer=True,
        mark=lambda: lambda: None,
    )
    run = PrefillForward(forwards, sender.plan(requests))
    for layer in range(LAYERS):
        run.before_attention(layer)
        run.after_attention(layer)
    run.finish()


def arrived(manager, src_pages, dst_pages):
    """Whether the pages are at D, in every layer."""
    for own, peer in zip(manager.own, manager.peer, strict=True):
        own, peer = own.reshape(-1, PAGE_BYTES), peer.reshape(-1, PAGE_BYTES)
        if not np.array_equal(own[src_pages], peer[dst_pages]):
            return False
    return True


def test_a_suffix_arrives_and_claims_all_of_sglangs_own_send(manager, sender):
    req = request(manager, 7, tokens=10, src_pages=[3, 9, 4, 5], dst_pages=[8, 1, 2])
    forward(sender, req)
    assert arrived(manager, [3, 9, 4], [8, 1, 2])
    sends = sender.claim(7, pages=3, is_last=True)
    assert sends is not None and all(send.done.is_set() for send in sends)
    sender.settle(7, sends)
    assert not manager.concluded and not sender.is_in_flight(7)


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
    assert [send.src.tolist() for send in first] == [[3]]
    req.extend_end = 14
    forward(sender, req)
    assert arrived(manager, [3, 4, 5, 6], [20, 21, 22, 23])
    rest = sender.claim(7, pages=4, is_last=True)
    assert [send.src.tolist() for send in rest] == [[4, 5, 6]]


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
