"""Whose next layer is transferred next."""

from __future__ import annotations

import heapq
from collections import defaultdict

from transfer.agent.jobs.transfer import Transfer
from transfer.pacing.pacer import Precedence

_AT_ONCE = -1
"""Plan number that precedes all others: of transfers that only have to end."""


class Turns:
    """Transfers between two layers. Not thread-safe: the queue calls it under its lock.

    The most urgent one is next, so a prefill engine's delivery overtakes a decode engine's
    between two layers. One engine never has more than ``workers_per_peer``, so that a hung one
    does not stop the others. Who has no room at the engine for the next layer stands aside.
    """

    def __init__(self, workers_per_peer: int) -> None:
        self._workers_per_peer = workers_per_peer
        self._waiting: defaultdict[str, list[tuple[Precedence, Transfer]]] = defaultdict(list)
        """A heap for each engine."""
        self._aside: list[Transfer] = []
        self._running: defaultdict[str, int] = defaultdict(int)
        self._arrivals = 0

    def enter(self, transfer: Transfer) -> None:
        """A new one."""
        self._arrivals += 1
        is_dead = transfer.stop_reason is not None
        plan = _AT_ONCE if is_dead else transfer.plan
        is_patient = not (transfer.urgent or is_dead)
        transfer.precedence = Precedence(is_patient, plan, self._arrivals)
        self.wait(transfer)

    def wait(self, transfer: Transfer) -> None:
        """Let it have its next layer when its turn comes."""
        if transfer.has_room or transfer.precedence.plan == _AT_ONCE:
            entry = transfer.precedence, transfer
            heapq.heappush(self._waiting[transfer.session_id], entry)
        else:
            self._aside.append(transfer)

    def hurry(self, transfer: Transfer) -> bool:
        """One that will not transfer anything costs no time: let it end now. False if it is
        with a worker, who will see."""
        waiting = self._waiting.get(transfer.session_id, [])
        if (entry := (transfer.precedence, transfer)) in waiting:
            waiting.remove(entry)
            heapq.heapify(waiting)
        elif transfer in self._aside:
            self._aside.remove(transfer)
        else:
            return False
        transfer.precedence = Precedence(False, _AT_ONCE, transfer.precedence.arrival)
        self.wait(transfer)
        return True

    @property
    def has_aside(self) -> bool:
        """Whether anyone waits for room."""
        return bool(self._aside)

    def call_back(self) -> int:
        """Let those wait for their turn for whose next layer there is room by now; how many."""
        called = [transfer for transfer in self._aside if transfer.has_room]
        for transfer in called:
            self._aside.remove(transfer)
            self.wait(transfer)
        return len(called)

    def next(self) -> Transfer | None:
        """The most urgent one whose engine may have one more worker, which it has from now."""
        best: list[tuple[Precedence, Transfer]] | None = None
        for session_id, waiting in self._waiting.items():
            is_free = self._running[session_id] < self._workers_per_peer
            if waiting and is_free and (best is None or waiting[0][0] < best[0][0]):
                best = waiting
        if best is None:
            return None
        transfer = heapq.heappop(best)[1]
        if not best:
            del self._waiting[transfer.session_id]
        self._running[transfer.session_id] += 1
        return transfer

    def leave(self, transfer: Transfer) -> None:
        """Its worker is done with it for now."""
        self._running[transfer.session_id] -= 1
        if not self._running[transfer.session_id]:
            del self._running[transfer.session_id]
