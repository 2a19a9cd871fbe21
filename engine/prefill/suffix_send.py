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

import msgspec
import numpy as np

from engine.page_table import PageTable
from engine.prefill.layer_copies import LayerCopies
from engine.sglang.prefill.send_manager import Destination, SendManager
from engine.sglang.views import Request
from engine.streams import HostPages
from transfer.mooncake import Addresses

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
    src: HostPages
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

    ``plan`` and ``claim`` run in the scheduler's thread, the rest in the workers'. While it is
    not ``is_on``, all is left to SGLang.
    """

    def __init__(
        self, manager: SendManager, copies: LayerCopies, table: PageTable, is_on: bool = True
    ) -> None:
        self._is_on = is_on
        self._manager = manager
        self.copies = copies
        self._table = table
        self._rooms: dict[int, _Room] = {}
        self._lock = threading.Lock()
        self._in_flight: Counter[int] = Counter()
        self.late_s_total = 0.0
        """Time between the end of forwards and the end of their sends."""

    @property
    def sends_index_keys(self) -> bool:
        """Whether what is kept beside the KV goes with it."""
        return self._manager.has_index_keys

    # ---- before a forward ----

    def plan(self, requests: Iterable[Request]) -> dict[str, list[LayerSend]]:
        """Sends of the forward about to run, by session."""
        by_session: dict[str, list[LayerSend]] = defaultdict(list)
        for request in requests:
            for send in self._plan_request(request):
                by_session[send.session_id].append(send)
                with self._lock:
                    self._in_flight[send.room] += 1
        if len(self._rooms) > ROOMS_MAX:
            known = self._manager.is_known
            self._rooms = {room: state for room, state in self._rooms.items() if known(room)}
        return by_session

    def _plan_request(self, request: Request) -> list[LayerSend]:
        destinations = self._destinations(request)
        if not destinations:
            return []
        number = request.bootstrap_room
        base = int(request.disagg_decode_prefix_len)
        room = self._rooms.setdefault(number, _Room(base, base))
        length, page = len(request.origin_input_ids), self._table.page_tokens
        end = min(request.extend_end, length)
        if end < length:
            end -= end % page  # a page that the next chunk completes goes with that
        start = room.next_token
        if end <= start or start % page:
            return []
        room.next_token = end
        src = self._table.pages(request, start, end)
        first = (start - base) // page
        sends = [
            LayerSend(
                number,
                destination.session_id,
                first,
                src,
                destination.pages[first : first + len(src)].astype(np.int64),
            )
            for destination in destinations
        ]
        room.sends += sends
        return sends

    def _destinations(self, request: Request) -> list[Destination]:
        return self._manager.destinations(request) if self._is_on else []

    def earlier(self, request: Request, start: int, pages: int) -> Earlier | None:
        """Where ``pages`` pages from token ``start`` on are, if earlier forwards have sent all
        of them (whole pages only); None otherwise."""
        room = self._rooms.get(request.bootstrap_room)
        destinations = self._destinations(request)
        page = self._table.page_tokens
        if room is None or not destinations or start < room.first_token or start % page:
            return None
        if start + pages * page > room.next_token:
            return None
        first = (start - room.first_token) // page
        at = destinations[0].pages[first : first + pages].astype(np.int64)
        return Earlier(destinations[0].session_id, at)

    # ---- while it runs: one session's worker ----

    def send_layer(self, session_id: str, sends: Sequence[LayerSend], layer: int) -> None:
        """Write one layer of these sends, all to one session. Never raises."""
        live = [send for send in sends if self._is_wanted(send)]
        if live:
            dst = np.concatenate([send.dst for send in live])
            try:
                src = np.concatenate([send.src.get() for send in live])
                self.copies.copy("write", session_id, src, dst, layer)
            except Exception as error:  # whatever it is, it ends these sends
                log.warning("layer not sent session=%s layer=%d: %s", session_id, layer, error)
                for send in live:
                    send.fail(f"layer {layer} not sent: {error}")
        if layer == self.copies.num_layers - 1:
            for send in sends:
                self._ended(send)

    def _is_wanted(self, send: LayerSend) -> bool:
        if not send.error and self._manager.has_failed(send.room):
            send.fail("the request has ended")
        return not send.error

    def _ended(self, send: LayerSend) -> None:
        send.done.set()
        with self._lock:
            self._in_flight[send.room] -= 1
            is_drained = not self._in_flight[send.room]
            if is_drained:
                del self._in_flight[send.room]
        if is_drained:
            self._manager.drained(send.room)

    # ---- SGLang's own send ----

    def claim(self, room: int, pages: int, is_last: bool) -> list[LayerSend] | None:
        """The sends that carry the first ``pages`` pages of a request's suffix, apart from
        those claimed before; None if some page is not planned."""
        state = self._rooms.get(room)
        if state is None:
            return None
        if is_last:
            del self._rooms[room]
        planned = -(-(state.next_token - state.first_token) // self._table.page_tokens)
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
            if send.error and not self._manager.has_failed(room):
                self._manager.fail_write(send.room, send.session_id, send.error)
        self.late_s_total += time.monotonic() - began_s

    def refuse(self, room: int, reason: str) -> None:
        """End a request whose KV is gone before it was sent."""
        if not self._manager.has_failed(room):
            self._manager.fail(room, reason)


class SendsDone:
    """Stands for the event that SGLang's transfer worker waits for before it sends a chunk."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.synchronize = settle
