"""What a prefill engine knows of its decode engines, and how the end of a send is told: our
view of SGLang's ``MooncakeKVManager`` (disaggregation/mooncake/conn.py)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.base.conn import StateType

from engine.sglang.border import Use
from engine.sglang.views import Request, TransferEngine
from transfer.mooncake import Addresses

_MANAGER = "disaggregation.mooncake.conn.MooncakeKVManager."
_INFO = "disaggregation.mooncake.conn.TransferInfo."
_PEER = "disaggregation.mooncake.conn.KVArgsRegisterInfo."
_OWN = "disaggregation.base.conn.KVArgs."
_REQUEST = "managers.schedule_batch.Req."
USES = (
    Use("disaggregation.base.KVPoll.Failed", "a request whose send has failed"),
    Use(_MANAGER + "engine", "the Mooncake engine that all of the process share"),
    Use(_MANAGER + "kv_args", "this engine's KV buffers"),
    Use(_OWN + "kv_data_ptrs", "their addresses, all layers of K first"),
    Use(_OWN + "kv_item_lens", "bytes of a page in each"),
    Use(_OWN + "num_draft_entries", "how many of them are a draft's: the last"),
    Use("disaggregation.base.conn.StateType.DSA", "index keys, with the page numbers of the KV"),
    Use("disaggregation.base.conn.StateType.SWA", "windows, which SGLang sends"),
    Use(_OWN + "state_types", "what is kept beside the KV"),
    Use(_OWN + "state_data_ptrs", "of each its addresses, by layer"),
    Use(_OWN + "state_item_lens", "of each bytes of a page, by layer; 0 where there is nothing"),
    Use(_PEER + "dst_state_data_ptrs", "the same of a decode engine"),
    Use(_PEER + "dst_state_item_lens", "the same of a decode engine"),
    Use(_MANAGER + "decode_kv_args_table", "session -> the KV buffers of that decode engine"),
    Use(_PEER + "dst_kv_ptrs", "their addresses, in the order of ours"),
    Use(_PEER + "dst_kv_item_len", "bytes of a page there; others than here: not page by page"),
    Use(_PEER + "requires_dcp_relayout", "its pages are split over several ranks"),
    Use(_MANAGER + "transfer_infos", "room -> session -> where that engine wants the request"),
    Use(_INFO + "mooncake_session_id", "the decode engine"),
    Use(_INFO + "is_dummy", "it wants nothing of this rank"),
    Use(_INFO + "dst_kv_indices", "its pages for the request's suffix"),
    Use(_INFO + "dst_device_kv_indices", "some pages are in host memory"),
    Use(_REQUEST + "disagg_kv_sender", "None: the request goes nowhere"),
    Use(_MANAGER + "request_status", "rooms that have not ended"),
    Use(_MANAGER + "check_status", "how a room's send stands"),
    Use(
        _MANAGER + "conclude_failure",
        "end a request, with the reason, here and at the decode engine",
        keywords=("bootstrap_room", "failure_reason"),
    ),
    Use(_MANAGER + "failed_sessions", "decode engines that are not written to any more"),
    Use(_MANAGER + "session_failures", "how often a write to each has failed"),
    Use(_MANAGER + "session_lock", "guards these two"),
    Use(_MANAGER + "failed_session_probes", "SGLang tries those again that were asked for lately"),
    Use("disaggregation.mooncake.conn.FailedSessionProbe.last_requested", "when that was"),
    Use(_MANAGER + "_poison_unsettled_send", "bytes may still land: give no page back early"),
    Use(
        _MANAGER + "_maybe_ack_drained_abort", "tell the decode engine that nothing lands any more"
    ),
)


class Destination(msgspec.Struct, frozen=True, eq=False):
    """Where a request's suffix goes: pages of one decode engine. Shape (pages,)."""

    session_id: str
    pages: Addresses


class Buffers(msgspec.Struct, frozen=True, eq=False):
    """Some of the KV buffers here and those that correspond to them at a decode engine, by
    address, and the bytes of a page in each. Shape (buffers,)."""

    here: Addresses
    there: Addresses
    page_bytes: Addresses


class SendManager:
    """A *room* is SGLang's number of a request, a *session* a rank of a decode engine."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    @property
    def engine(self) -> TransferEngine:
        """Mooncake's, of this process."""
        return self._manager.engine

    # ---- what decode engines want ----

    def destinations(self, request: Request) -> list[Destination]:
        """Of a request; none if any of them needs more than pages."""
        if getattr(request, "disagg_kv_sender", None) is None or request.pending_bootstrap:
            return []
        infos = self._manager.transfer_infos.get(request.bootstrap_room, {})
        wanting = [info for info in infos.values() if not info.is_dummy]
        if not all(map(self._is_page_wise, wanting)):
            return []
        return [Destination(info.mooncake_session_id, info.dst_kv_indices) for info in wanting]

    def _is_page_wise(self, info: Any) -> bool:
        peer = self._manager.decode_kv_args_table.get(info.mooncake_session_id)
        own = self._manager.kv_args
        return (
            peer is not None
            and not peer.requires_dcp_relayout
            and info.dst_device_kv_indices is None
            and len(peer.dst_kv_ptrs) == len(own.kv_data_ptrs)
            and peer.dst_kv_item_len == own.kv_item_lens[0]
            and set(own.state_types) <= {StateType.DSA, StateType.SWA}
            and len(peer.dst_state_data_ptrs) == len(own.state_types)
        )

    @property
    def has_index_keys(self) -> bool:
        """Whether they go layer by layer with the KV; windows go with SGLang's last send."""
        return list(self._manager.kv_args.state_types) == [StateType.DSA]

    def buffers(
        self, session_id: str, layer: int, kv_layers: Sequence[int], with_index: bool = False
    ) -> Buffers:
        """Of one layer, which is one of those with KV (``kv_layers``), for page-wise transfers
        with a decode engine; index keys on request. A draft has as many buffers for each of its
        layers; these are the last layers, and its buffers the last ones."""
        own, peer = self._manager.kv_args, self._manager.decode_kv_args_table[session_id]
        of_layer = len(own.kv_data_ptrs) // len(kv_layers)
        draft_layers = own.num_draft_entries // of_layer
        at, layers = kv_layers.index(layer), len(kv_layers) - draft_layers
        which = slice(at, layers * of_layer, layers)
        if at >= layers:
            which = slice(layers * of_layer + at - layers, None, draft_layers)
        here, there = own.kv_data_ptrs[which], peer.dst_kv_ptrs[which]
        page_bytes = own.kv_item_lens[which]
        # A decode engine has no memory for the layers that share an indexer.
        if with_index and self.has_index_keys and peer.dst_state_item_lens[0][layer]:
            here = [*here, own.state_data_ptrs[0][layer]]
            there = [*there, peer.dst_state_data_ptrs[0][layer]]
            page_bytes = [*page_bytes, own.state_item_lens[0][layer]]
        return Buffers(*(np.array(of, np.int64) for of in (here, there, page_bytes)))

    # ---- how sends end ----

    def is_known(self, room: int) -> bool:
        """Whether the request has not ended, or not long ago."""
        return room in self._manager.request_status

    def has_failed(self, room: int) -> bool:
        """Whether nothing is to be sent for it any more."""
        return not self.is_known(room) or self._manager.check_status(room) == KVPoll.Failed

    def is_refused(self, session_id: str) -> bool:
        """Whether a write there has failed, and SGLang has not found it well again."""
        return session_id in self._manager.failed_sessions

    def fail(self, room: int, reason: str) -> None:
        """End a request of which nothing is in flight."""
        self._manager.conclude_failure(bootstrap_room=room, failure_reason=reason)

    def fail_write(self, room: int, session_id: str, reason: str) -> None:
        """End a request, a write of which has failed, as SGLang does for a write of its own."""
        manager = self._manager
        with manager.session_lock:
            manager.session_failures[session_id] += 1
            manager.failed_sessions.add(session_id)
            probe = manager.failed_session_probes.get(session_id)
            if probe is not None:
                probe.last_requested = time.monotonic()
        # Bytes of a failed write may still land: SGLang then gives the pages back by timeout.
        manager._poison_unsettled_send(room)
        self.fail(room, reason)

    def drained(self, room: int) -> None:
        """Nothing of ours is in flight any more: answer an abort that waits for that."""
        self._manager._maybe_ack_drained_abort(room)
