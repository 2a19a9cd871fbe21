"""Prefill engine: a request's new KV leaves for its decode engine layer by layer.

Stock SGLang sends a chunk after its forward, all layers at once. Here layer ``l`` of every
request of the batch goes out as soon as its attention has run, one batched write for each
decode engine, while the later layers compute. SGLang's own send of the chunk is then
empty: it waits for these writes, and tells the decode engine as ever
(sglang/srt/disaggregation/mooncake/conn.py, ``transfer_worker``).

What cannot go page by page (another tensor-parallel size on the other side, a decode
engine that has not registered) is left to SGLang.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from sglang.srt.disaggregation.base import KVPoll

from engine.kv_memory import page_runs
from transfer.mooncake import Addresses, Operation, batches, host_of, transfer_batch

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 60.0
"""After a forward, for its layers to be with the decode engine."""
ROOMS_MAX = 4096


class LayerSend(msgspec.Struct, eq=False):
    """Pages that one forward completes of one request, for one decode engine. Shape (pages,)."""

    room: int
    session_id: str
    first_page: int
    """Of the request's suffix."""
    src: Addresses
    dst: Addresses
    done: threading.Event = msgspec.field(default_factory=threading.Event)
    """Set when nothing of it is in flight, or when it has failed."""
    error: str = ""

    def fail(self, reason: str) -> None:
        self.error = self.error or reason
        self.done.set()


class _Room(msgspec.Struct):
    """What has been planned for one request, over its chunks."""

    first_token: int
    """The decode engine has everything before it."""
    next_token: int
    sends: list[LayerSend] = []


class Earlier(msgspec.Struct, frozen=True, eq=False):
    """Where pages of a request's earlier chunks are: at a decode engine. Shape (pages,)."""

    session_id: str
    pages: Addresses


class SuffixSender:
    """Plans the sends of a forward, makes them, and answers for them to SGLang.

    ``plan`` and ``claim`` run in the scheduler's thread, the rest in the workers'.
    """

    def __init__(
        self, manager: Any, page_tokens: int, num_layers: int, table: Any, is_on: bool = True
    ) -> None:
        self._is_on = is_on
        self._manager = manager
        self._page_tokens = page_tokens
        self._num_layers = num_layers
        self._table = table
        self._rooms: dict[int, _Room] = {}
        self._lock = threading.Lock()
        self._in_flight: Counter[int] = Counter()
        self._moved_bytes: Counter[tuple[str, str]] = Counter()
        self.sent_bytes_total = 0
        self.late_s_total = 0.0
        """Time between the end of forwards and the end of their sends."""

    # ---- before a forward ----

    def plan(self, requests: Iterable[Any]) -> dict[str, list[LayerSend]]:
        """Sends of the forward about to run, by session."""
        by_session: dict[str, list[LayerSend]] = defaultdict(list)
        for request in requests:
            for send in self._plan_request(request):
                by_session[send.session_id].append(send)
                with self._lock:
                    self._in_flight[send.room] += 1
        if len(self._rooms) > ROOMS_MAX:
            live = self._manager.request_status
            self._rooms = {room: state for room, state in self._rooms.items() if room in live}
        return by_session

    def _plan_request(self, request: Any) -> list[LayerSend]:
        infos = self._destinations(request)
        if not infos:
            return []
        number = request.bootstrap_room
        base = int(request.disagg_decode_prefix_len)
        room = self._rooms.setdefault(number, _Room(base, base))
        length, page = len(request.origin_input_ids), self._page_tokens
        end = min(request.extend_end, length)
        if end < length:
            end -= end % page  # a page that the next chunk completes goes with that
        start = room.next_token
        if end <= start or start % page:
            return []
        room.next_token = end
        src = self._table[request.kv.req_pool_idx, start:end:page].cpu().numpy() // page
        first = (start - base) // page
        sends = [
            LayerSend(
                number,
                info.mooncake_session_id,
                first,
                src.astype(np.int64),
                info.dst_kv_indices[first : first + len(src)].astype(np.int64),
            )
            for info in infos
        ]
        room.sends += sends
        return sends

    def _destinations(self, request: Any) -> list[Any]:
        """SGLang's transfer infos of a request; none if any of them needs more than pages."""
        sender = getattr(request, "disagg_kv_sender", None)
        if sender is None or request.pending_bootstrap or not self._is_on:
            return []
        infos = self._manager.transfer_infos.get(request.bootstrap_room, {})
        real = [info for info in infos.values() if not info.is_dummy]
        return real if all(map(self._is_page_wise, real)) else []

    def _is_page_wise(self, info: Any) -> bool:
        peer = self._manager.decode_kv_args_table.get(info.mooncake_session_id)
        own = self._manager.kv_args
        return (
            peer is not None
            and not peer.requires_dcp_relayout
            and info.dst_device_kv_indices is None
            and len(peer.dst_kv_ptrs) == len(own.kv_data_ptrs)
            and peer.dst_kv_item_len == own.kv_item_lens[0]
        )

    # ---- while it runs: one session's worker ----

    def send_layer(self, session_id: str, sends: Sequence[LayerSend], layer: int) -> None:
        """Write one layer of these sends, all to one session. Never raises."""
        live = [send for send in sends if self._is_wanted(send)]
        if live:
            try:
                self._write(session_id, live, layer)
            except Exception as error:  # whatever it is, it ends these sends
                log.warning("layer not sent session=%s layer=%d: %s", session_id, layer, error)
                for send in live:
                    send.fail(f"layer {layer} not sent: {error}")
        if layer == self._num_layers - 1:
            for send in sends:
                self._ended(send)

    def _is_wanted(self, send: LayerSend) -> bool:
        if not send.error and self._room_failed(send.room):
            send.fail("the request has ended")
        return not send.error

    def _room_failed(self, room: int) -> bool:
        manager = self._manager
        return room not in manager.request_status or manager.check_status(room) == KVPoll.Failed

    def earlier(self, request: Any, start: int, pages: int) -> Earlier | None:
        """Where ``pages`` pages from token ``start`` on are, if earlier forwards have sent all
        of them (whole pages only); None otherwise."""
        room = self._rooms.get(request.bootstrap_room)
        infos = self._destinations(request)
        page = self._page_tokens
        if room is None or not infos or start < room.first_token or start % page:
            return None
        if start + pages * page > room.next_token:
            return None
        first = (start - room.first_token) // page
        at = infos[0].dst_kv_indices[first : first + pages].astype(np.int64)
        return Earlier(infos[0].mooncake_session_id, at)

    def read_layer(self, earlier: Earlier, pages: Addresses, layer: int) -> None:
        """Read one layer of these pages back into ``pages`` (shape (pages,)) of this engine.
        Raises ``ConnectionError``."""
        ranges = self._ranges(earlier.session_id, pages, earlier.pages, layer)
        self._transfer("read", earlier.session_id, ranges)

    def _write(self, session_id: str, sends: Sequence[LayerSend], layer: int) -> None:
        src = np.concatenate([send.src for send in sends])
        dst = np.concatenate([send.dst for send in sends])
        ranges = self._ranges(session_id, src, dst, layer)
        self._transfer("write", session_id, ranges)
        self.sent_bytes_total += int(ranges[2].sum())

    def _ranges(
        self, session_id: str, own_pages: Addresses, peer_pages: Addresses, layer: int
    ) -> tuple[Addresses, Addresses, Addresses]:
        """Of one layer: here, there, and how long."""
        own, peer = self._manager.kv_args, self._manager.decode_kv_args_table[session_id]
        buffers = range(layer, len(own.kv_data_ptrs), self._num_layers)
        return page_runs(
            own_pages,
            peer_pages,
            np.array([own.kv_data_ptrs[b] for b in buffers], np.int64),
            np.array([peer.dst_kv_ptrs[b] for b in buffers], np.int64),
            np.array([own.kv_item_lens[b] for b in buffers], np.int64),
        )

    def _transfer(
        self,
        operation: Operation,
        session_id: str,
        ranges: tuple[Addresses, Addresses, Addresses],
    ) -> None:
        if session_id in self._manager.failed_sessions:
            raise ConnectionError(f"session {session_id} failed before")
        engine = self._manager.engine.engine
        for part in batches(ranges[2]):
            code = transfer_batch(engine, operation, session_id, *(r[part] for r in ranges))
            if code != 0:
                raise ConnectionError(f"transfer failed with code {code}")
        with self._lock:
            self._moved_bytes[operation, host_of(session_id)] += int(ranges[2].sum())

    def is_local(self, session_id: str) -> bool:
        """Whether that decode engine has this one's address."""
        return host_of(session_id) == str(self._manager.engine.hostname)

    def moved_bytes(self) -> dict[tuple[str, str], int]:
        """("write" or "read", the decode engines' address) -> bytes so far."""
        with self._lock:
            return dict(self._moved_bytes)

    def _ended(self, send: LayerSend) -> None:
        send.done.set()
        with self._lock:
            self._in_flight[send.room] -= 1
            is_drained = not self._in_flight[send.room]
            if is_drained:
                del self._in_flight[send.room]
        if is_drained:
            self._manager._maybe_ack_drained_abort(send.room)

    # ---- SGLang's own send ----

    def claim(self, room: int, pages: int, is_last: bool) -> list[LayerSend] | None:
        """The sends that carry the first ``pages`` pages of a request's suffix, apart from
        those claimed before; None if some page is not planned."""
        state = self._rooms.get(room)
        if state is None:
            return None
        if is_last:
            del self._rooms[room]
        planned = -(-(state.next_token - state.first_token) // self._page_tokens)
        if pages > planned:
            return None
        claimed = [send for send in state.sends if send.first_page < pages]
        state.sends = [send for send in state.sends if send.first_page >= pages]
        return claimed

    def is_in_flight(self, room: int) -> bool:
        """Whether the decode engine's pages of this request may still be written to."""
        return room in self._in_flight

    def settle(self, room: int, sends: Iterable[LayerSend]) -> None:
        """Wait for a chunk's sends; on failure the room fails as in SGLang's own send."""
        began_s = time.monotonic()
        deadline_s = began_s + SEND_TIMEOUT_S
        for send in sends:
            if not send.done.wait(max(0.0, deadline_s - time.monotonic())):
                send.fail(f"not sent within {SEND_TIMEOUT_S} s")
            if send.error and not self._room_failed(room):
                self._conclude_failed(send)
        self.late_s_total += time.monotonic() - began_s

    def refuse(self, room: int, reason: str) -> None:
        """End a request whose KV is gone before it was sent."""
        if not self._room_failed(room):
            self._manager.conclude_failure(bootstrap_room=room, failure_reason=reason)

    def _conclude_failed(self, send: LayerSend) -> None:
        manager = self._manager
        with manager.session_lock:
            manager.session_failures[send.session_id] += 1
            manager.failed_sessions.add(send.session_id)
            probe = manager.failed_session_probes.get(send.session_id)
            if probe is not None:
                probe.last_requested = time.monotonic()
        # Bytes of a failed write may still land: SGLang then gives the pages back by timeout.
        manager._poison_unsettled_send(send.room)
        manager.conclude_failure(bootstrap_room=send.room, failure_reason=send.error)


class SendsDone:
    """Stands for the event that SGLang's transfer worker waits for before it sends a chunk."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.synchronize = settle
