"""What processes of a kind have reported, and what they were promised: a row of each array."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from common.block import TierName
from common.ids import NO_INCARNATION, Incarnation
from common.prefill_cost import TERMS, request_terms
from scheduler.rows.names import Names

REPORT_LAG_S = 0.25
"""A report that came sooner after a hand-over may have been written before it."""

Floats = NDArray[np.float64]
Rows = NDArray[np.intp]
Mask = NDArray[np.bool_]


class Device(IntEnum):
    """What of an agent's node can be a bottleneck: columns of its numbers."""

    SSD = 0
    STORAGE_NIC = 1
    COMPUTE_OUT = 2
    """The compute NIC, sending what the agent delivers ..."""
    COMPUTE_IN = 3
    """... and receiving what is delivered into the node's engine."""


READING = slice(Device.SSD, Device.COMPUTE_OUT)
"""The devices that read."""


DEVICE_OF = {TierName.SSD: Device.SSD, TierName.REMOTE: Device.STORAGE_NIC}


class Processes:
    """Rows of one kind of process; the arrays' rows beyond ``len(names)`` are unused, and those of
    processes that have left, until another process gets them.

    ``promised`` has ``kinds`` columns: the sum of all promises to the process, by kind.
    """

    def __init__(self, kinds: int) -> None:
        self._rows = Names()
        self.incarnation: list[Incarnation] = []
        self.last_seen_s: Floats = np.empty(0)
        self.draining: Mask = np.empty(0, bool)
        self.drained: set[str] = set()
        """Names that are to get nothing new, also those not seen yet."""
        self.promised: Floats = np.empty((0, kinds))
        self._promises: list[dict[int, tuple[Floats, float]]] = []
        """By row and promise (a plan has two): how much of each kind, and when it was made."""
        self._columns = ["last_seen_s", "draining", "promised"]

    def row(self, name: str) -> int:
        """The row of a process, a new one for a name not seen before."""
        row = self.row_of.get(name)
        if row is not None:
            return row
        row = self._rows.number(name)
        if row == len(self.incarnation):
            self.incarnation.append(NO_INCARNATION)
            self._promises.append({})
        if row == len(self.last_seen_s):
            self._grow(max(8, 2 * row))
        self.last_seen_s[row] = -np.inf
        self.draining[row] = name in self.drained
        return row

    @property
    def names(self) -> list[str]:
        """By row; "" of one that is free."""
        return self._rows.listed

    @property
    def row_of(self) -> dict[str, int]:
        return self._rows.number_of

    def remove(self, name: str) -> None:
        """The process has left the cluster: its row is as if nobody had ever had it."""
        self.drained.discard(name)
        if name not in self.row_of:
            return
        row = self._rows.remove(name)
        self.incarnation[row] = NO_INCARNATION
        self._promises[row] = {}
        for column in self._columns:
            getattr(self, column)[row] = 0
        self.last_seen_s[row] = -np.inf

    def drain(self, name: str, on: bool) -> None:
        """Give the process nothing new, or again; also one that has not been seen yet."""
        if on:
            self.drained.add(name)
        else:
            self.drained.discard(name)
        if name in self.row_of:
            self.draining[self.row_of[name]] = on

    def _grow(self, rows: int) -> None:
        for column in self._columns:
            old = getattr(self, column)
            new = np.zeros((rows, *old.shape[1:]), old.dtype)
            new[: len(old)] = old
            setattr(self, column, new)

    def report(self, name: str, incarnation: Incarnation, now: float) -> int | None:
        """Note a sign of life; None if it is an earlier incarnation's and must be ignored."""
        row = self.row(name)
        if incarnation < self.incarnation[row]:
            return None
        if incarnation > self.incarnation[row]:
            self._promises[row].clear()
            self.promised[row] = 0
        self.incarnation[row] = incarnation
        self.last_seen_s[row] = now
        due = [p for p, (_, at) in self._promises[row].items() if at + REPORT_LAG_S <= now]
        for promise in due:
            self.settle(row, promise)
        return row

    def lost(self, name: str) -> None:
        """The process is known to be gone, until it reports again."""
        row = self.row(name)
        self.last_seen_s[row] = -np.inf
        self._promises[row].clear()
        self.promised[row] = 0

    def promise(self, rows: Rows, promise: int, amounts: Floats, at: float) -> None:
        """Count work in until a report that comes after ``at`` shows it; ``at`` is infinite
        while the scheduler alone knows of the work. ``amounts`` has a row for each process."""
        for row, of_row in zip(rows.tolist(), amounts, strict=True):
            self._promises[row][promise] = of_row, at
        self.promised[rows] += amounts

    def promised_to(self, row: int, promise: int) -> Floats | None:
        """What is still promised to the process."""
        entry = self._promises[row].get(promise)
        return entry[0] if entry is not None else None

    def handed_over(self, row: int, promise: int, now: float) -> None:
        """The process has the work now: its reports will show it."""
        if promise in self._promises[row]:
            self._promises[row][promise] = self._promises[row][promise][0], now

    def settle(self, row: int, promise: int) -> None:
        """The work is done or given up, or shows in the reports."""
        promises = self._promises[row]
        entry = promises.pop(promise, None)
        if entry is None:
            return
        if promises:
            self.promised[row] -= entry[0]
        else:  # Rounding must not add up: with no promise left the sum is 0 again.
            self.promised[row] = 0


class Engines(Processes):
    """Prefill and decode engines, as their groups' leaders report them."""

    TOKENS, SEQUENCES, CONTEXT = range(3)
    """Kinds of promises: prompt tokens to compute, requests, KV tokens to hold."""

    def __init__(self) -> None:
        super().__init__(3)
        self.is_prefill: Mask = np.empty(0, bool)
        self.agent_row: Rows = np.empty(0, np.intp)
        self.group: Rows = np.empty(0, np.intp)
        self.groups = Names()
        self.linked: dict[str, frozenset[str]] = {}
        """Agents that an engine has a link to; absent: it does not say."""
        self.sequences: Floats = np.empty(0)
        self.pending_tokens: Floats = np.empty(0)
        self.context_tokens: Floats = np.empty(0)
        self.free_tokens: Floats = np.empty(0)
        self.chosen_total = 0
        """Decisions made."""
        self.last_chosen: Floats = np.empty(0)
        """Number of the decision that last chose it: ties go to the one that waited longest."""
        self.prefill_cost: Floats = np.empty((0, len(TERMS)))
        """Fitted coefficients of a prefill forward (common/prefill_cost.py); 0: unknown."""
        self.window_tokens: Floats = np.empty(0)
        """Of the model's layers with a sliding window, which that formula needs."""
        self._columns += ["is_prefill", "agent_row", "group", "sequences", "pending_tokens"]
        self._columns += ["context_tokens", "free_tokens", "last_chosen"]
        self._columns += ["prefill_cost", "window_tokens"]

    def remove(self, name: str) -> None:
        self.linked.pop(name, None)
        row = self.row_of.get(name)
        if row is not None:
            group = self.group[row]
            super().remove(name)
            others = [self.group[other] for other in self.row_of.values()]
            if group not in others:
                self.groups.remove(self.groups.listed[group])
        else:
            super().remove(name)

    def note_chosen(self, *rows: int) -> None:
        """A decision chose these."""
        self.chosen_total += 1
        for row in rows:
            self.last_chosen[row] = self.chosen_total

    def compute_s(self, row: int | Rows, tokens: float | Floats, context: float | Floats) -> Floats:
        """Time of prefilling ``tokens`` after ``context`` tokens; 0 while not measured."""
        costs, terms = (
            self.prefill_cost[row],
            request_terms(context, tokens, self.window_tokens[row]),
        )
        of_terms = np.einsum("...i,i...->...", costs[..., 1:], terms)
        return np.asarray(costs[..., 0] + of_terms)

    @property
    def token_s(self) -> Floats:
        """Fitted time of a new token alone; 0: unknown."""
        return self.prefill_cost[:, TERMS.index("token_s")]


class Agents(Processes):
    """Agents; every number by :class:`Device`. Promises are bytes, likewise by device."""

    def __init__(self) -> None:
        super().__init__(len(Device))
        devices = len(Device)
        self.queue_bytes: Floats = np.empty((0, devices))
        self.measured_bytes_per_s: Floats = np.empty((0, devices))
        self.measured_at_s: Floats = np.empty((0, devices))
        """When the measured rate last changed, that is, was measured anew."""
        self.assigned_bytes: Floats = np.empty(0)
        """All that plans ever gave it to read."""
        self.dram_slots: Floats = np.empty(0)
        self.dram_slots_free: Floats = np.empty(0)
        self._columns += ["queue_bytes", "measured_bytes_per_s", "measured_at_s"]
        self._columns += ["assigned_bytes", "dram_slots", "dram_slots_free"]

    def measured(self, row: int, device: Device, bytes_per_s: float, now: float) -> None:
        """Take over a reported rate."""
        if bytes_per_s != self.measured_bytes_per_s[row, device]:
            self.measured_bytes_per_s[row, device] = bytes_per_s
            self.measured_at_s[row, device] = now
