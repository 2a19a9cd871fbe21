"""SGLang's side of a prefill engine's sends, made up: a write is a memcpy."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import torch
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.base.conn import StateType

PAGE = 4
LAYERS = 3
ROW_BYTES = 8
PAGE_BYTES = PAGE * ROW_BYTES
SESSION = "d0:1"


def pool(pages: int, seed: int, components: int = 2, window: int = LAYERS) -> list[np.ndarray]:
    """K and V buffers (or latents), K of all layers first; of a window some are the same."""
    random = np.random.default_rng(seed)
    of_component = [
        [random.integers(0, 256, pages * PAGE_BYTES, np.uint8) for _ in range(window)]
        for _ in range(components)
    ]
    return [buffers[layer % window] for buffers in of_component for layer in range(LAYERS)]


class FakeManager:
    """What is used of SGLang's MooncakeKVManager; a write is a memcpy."""

    def __init__(self, components: int = 2, window: int = LAYERS) -> None:
        self.own = pool(32, 1, components, window)
        self.peer = pool(32, 2, components)
        self.kv_args = SimpleNamespace(
            kv_data_ptrs=[b.ctypes.data for b in self.own],
            kv_item_lens=[PAGE_BYTES] * components * LAYERS,
            num_draft_entries=0,
            state_types=[],
        )
        self.decode_kv_args_table = {
            SESSION: SimpleNamespace(
                dst_kv_ptrs=[b.ctypes.data for b in self.peer],
                dst_kv_item_len=PAGE_BYTES,
                requires_dcp_relayout=False,
                dst_state_data_ptrs=[],
            )
        }
        self.transfer_infos, self.request_status = {}, {}
        self.session_lock = threading.Lock()
        self.session_failures, self.failed_sessions = defaultdict(int), set()
        self.failed_session_probes = {}
        self.engine = SimpleNamespace(engine=self, hostname="p0", register=lambda *_: None)
        self.code = 0
        self.writes = 0
        self.concluded, self.poisoned, self.acked = {}, [], []
        self.req_to_token = torch.zeros((4, 128), dtype=torch.int32)

    def give_index_keys(self, without=()):
        """Of sparse attention; D has no memory for layers ``without``, P for all."""
        self.own_index, self.peer_index = pool(32, 3, 1), pool(32, 4, 1)
        self.kv_args.state_types = [StateType.DSA]
        self.kv_args.state_data_ptrs = [[b.ctypes.data for b in self.own_index]]
        self.kv_args.state_item_lens = [[PAGE_BYTES] * LAYERS]
        peer, layers = self.decode_kv_args_table[SESSION], range(LAYERS)
        addresses = [0 if n in without else self.peer_index[n].ctypes.data for n in layers]
        peer.dst_state_data_ptrs = [addresses]
        peer.dst_state_item_lens = [[0 if n in without else PAGE_BYTES for n in layers]]

    def batch_transfer_async_write(self, *_):
        return 0  # not taken: then the synchronous call is made

    batch_transfer_async_read = batch_transfer_async_write

    def batch_transfer_sync_read(self, session, dst, src, lengths):
        for a, b, length in zip(src, dst, lengths, strict=True):
            ctypes.memmove(b, a, length)
        return self.code

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


def arrived(manager, src_pages, dst_pages):
    """Whether the pages are at D, in every layer."""
    for own, peer in zip(manager.own, manager.peer, strict=True):
        own, peer = own.reshape(-1, PAGE_BYTES), peer.reshape(-1, PAGE_BYTES)
        if not np.array_equal(own[src_pages], peer[dst_pages]):
            return False
    return True
