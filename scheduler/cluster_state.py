"""What the scheduler knows of engines and agents: their last reports, and what it has
promised on top of them.

A report is late by a heartbeat, and a decision shows in it only once the work has reached
the process. Until then the decision is kept as a *promise* and counted in, so that the
requests between two reports do not all go to the node that looked idle in the last one.

Numbers of all processes of a kind lie in one array a field, one row a process, because a
decision looks at every one of up to a thousand nodes.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from common.block import TierName
from common.ids import NO_INCARNATION, Incarnation
from common.loads import AgentLoad, EngineLoad
from common.prefill_cost import TERMS, request_terms
from scheduler.options import SchedulerOptions

PREFILL = "prefill"
DECODE = "decode"
REPORT_LAG_S = 0.25
"""A report that came sooner after a hand-over may have been written before it."""
DEFAULT_BYTES_PER_S = 1e9
"""Assumed of a device while none of its kind has been measured."""
RATE_TRUSTED_S = 5.0
"""A measured rate that no new measurement confirms for longer fades ..."""
RATE_FADES_S = 5.0
"""... with this time constant towards the mean of the others: a node that was slow gets
work again, and with it the measurement that says what it is worth now."""
BETA_PROBE_TOKENS = 4096
"""A prefill engine's speed is taken from a forward of so many tokens."""

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
    """Rows of one kind of process; the arrays' rows beyond ``len(names)`` are unused.

    ``promised`` has ``kinds`` columns: the sum of all promises to the process, by kind.
    """

    def __init__(self, kinds: int) -> None:
        self.names: list[str] = []
        self.row_of: dict[str, int] = {}
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
        row = self.row_of[name] = len(self.names)
        self.names.append(name)
        self.incarnation.append(NO_INCARNATION)
        self._promises.append({})
        if row == len(self.last_seen_s):
            self._grow(max(8, 2 * row))
        self.last_seen_s[row] = -np.inf
        self.draining[row] = name in self.drained
        return row

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
        self.groups: dict[str, int] = {}
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
        self._columns += ["is_prefill", "agent_row", "group", "sequences", "pending_tokens"]
        self._columns += ["context_tokens", "free_tokens", "last_chosen"]
        self._columns += ["prefill_cost"]

    def note_chosen(self, *rows: int) -> None:
        """A decision chose these."""
        self.chosen_total += 1
        for row in rows:
            self.last_chosen[row] = self.chosen_total

    def compute_s(self, row: int | Rows, tokens: float | Floats, context: float | Floats) -> Floats:
        """Time of prefilling ``tokens`` after ``context`` tokens; 0 while not measured."""
        costs = self.prefill_cost[row]
        return np.asarray(costs[..., 0] + costs[..., 1:] @ request_terms(context, tokens))

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


class ClusterState:
    """All engines and agents. Call :meth:`look` first in every decision."""

    LOOK_S = 0.02
    """Who is alive, and the rates, are worked out anew after this time or any report."""

    def __init__(self, options: SchedulerOptions) -> None:
        self.options = options
        self.engines = Engines()
        self.agents = Agents()
        self.alive_agents: frozenset[str] = frozenset()
        """Agents that may be given reads: alive, and not draining."""
        self.agent_rows: Rows = np.empty(0, np.intp)
        """Their rows."""
        self.engine_rows: dict[str, Rows] = {}
        """Engines that may be given requests, by role."""
        self.usable_agents: Mask = np.empty(0, bool)
        self.usable_engines: Mask = np.empty(0, bool)
        self.bytes_per_s: Floats = np.empty((0, len(Device)))
        """Rates to reckon with, shape (agents, devices); never 0."""
        self.alpha_bytes: Floats = np.empty(0)
        """A read queue up to here is short; by engine, for the agent of its node."""
        self.beta_tokens: Floats = np.empty(0)
        """A prefill engine with more to compute is full; infinite while not measured."""
        self._looked_s = -np.inf

    def report_engine(self, load: EngineLoad, now: float) -> None:
        """Take over a heartbeat, unless it is an earlier incarnation's."""
        engines = self.engines
        row = engines.report(load.engine, load.incarnation, now)
        if row is None:
            return
        engines.is_prefill[row] = load.role == PREFILL
        engines.agent_row[row] = self.agents.row(load.agent)
        group = load.group or load.engine
        engines.group[row] = engines.groups.setdefault(group, len(engines.groups))
        engines.sequences[row] = load.sequences
        engines.pending_tokens[row] = load.pending_tokens
        engines.context_tokens[row] = load.context_tokens
        engines.free_tokens[row] = load.free_tokens
        if load.prefill_cost is not None:
            engines.prefill_cost[row] = load.prefill_cost.coefficients()
        self._notice(row, self.usable_engines)

    def report_agent(self, load: AgentLoad, now: float) -> bool:
        """The same for an agent; False if it is an earlier incarnation's."""
        agents = self.agents
        row = agents.report(load.agent, load.incarnation, now)
        if row is None:
            return False
        for tier, device in DEVICE_OF.items():
            agents.queue_bytes[row, device] = load.read_queue_bytes.get(tier, 0)
            agents.measured(row, device, load.read_bytes_per_s.get(tier, 0.0), now)
        agents.queue_bytes[row, Device.COMPUTE_OUT] = load.deliver_queue_bytes
        agents.measured(row, Device.COMPUTE_OUT, load.deliver_bytes_per_s, now)
        agents.dram_slots[row] = load.dram_slots
        agents.dram_slots_free[row] = load.dram_slots_free
        self._notice(row, self.usable_agents)
        return True

    def _notice(self, row: int, usable: Mask) -> None:
        """A process that was not usable may be now; of others the numbers are read live."""
        if row >= len(usable) or not usable[row]:
            self.changed()

    def changed(self) -> None:
        """A report came, or a process went."""
        self._looked_s = -np.inf

    def look(self, now: float) -> None:
        """Bring up to date what depends on the time."""
        if 0 <= now - self._looked_s < self.LOOK_S:
            return
        self._looked_s = now
        timeout_s = self.options.heartbeat_timeout_s
        self.usable_engines = self._usable(self.engines, now, timeout_s)
        self.usable_agents = self._usable(self.agents, now, timeout_s)
        is_prefill = self.engines.is_prefill[: len(self.usable_engines)]
        self.engine_rows = {
            PREFILL: np.flatnonzero(self.usable_engines & is_prefill),
            DECODE: np.flatnonzero(self.usable_engines & ~is_prefill),
        }
        names = self.agents.names
        self.agent_rows = np.flatnonzero(self.usable_agents)
        alive = frozenset(names[row] for row in self.agent_rows.tolist())
        if alive != self.alive_agents:
            self.alive_agents = alive
        self.bytes_per_s = self._rates(now)
        self.alpha_bytes = self._alpha_bytes()
        self.beta_tokens = self._beta_tokens()

    @staticmethod
    def _usable(processes: Processes, now: float, timeout_s: float) -> Mask:
        count = len(processes.names)
        seen = now - processes.last_seen_s[:count] <= timeout_s
        return np.asarray(seen & ~processes.draining[:count])

    def _rates(self, now: float) -> Floats:
        count = len(self.agents.names)
        measured = self.agents.measured_bytes_per_s[:count]
        known = measured > 0
        sums, counts = measured.sum(axis=0), known.sum(axis=0)
        mean = np.where(counts, sums / np.maximum(counts, 1), DEFAULT_BYTES_PER_S)
        stale_s = np.maximum(0.0, now - self.agents.measured_at_s[:count] - RATE_TRUSTED_S)
        # Only upwards: a fast node need not be measured again to stay one.
        faded = mean + (measured - mean) * np.exp(-stale_s / RATE_FADES_S)
        rates = np.where(known, np.maximum(measured, faded), mean)
        rates[:, Device.COMPUTE_IN] = rates[:, Device.COMPUTE_OUT]  # full duplex, one speed
        return rates

    def _alpha_bytes(self) -> Floats:
        """What each engine's agent reads from remote storage in alpha seconds."""
        count = len(self.usable_engines)
        if self.options.alpha_bytes:
            return np.full(count, float(self.options.alpha_bytes))
        rates = self.bytes_per_s[self.engines.agent_row[:count], Device.STORAGE_NIC]
        return np.asarray(self.options.alpha_s * rates)

    def _beta_tokens(self) -> Floats:
        """What each engine computes in beta seconds, from its time for a usual forward."""
        count = len(self.usable_engines)
        if self.options.beta_tokens:
            return np.full(count, float(self.options.beta_tokens))
        probe_s = self.engines.compute_s(np.arange(count), BETA_PROBE_TOKENS, 0.0)
        tokens = self.options.beta_s * BETA_PROBE_TOKENS
        return np.divide(tokens, probe_s, out=np.full(count, np.inf), where=probe_s > 0)

    def backlog_s(self) -> Floats:
        """Time until each device has done its queue and its promises; shape (agents, devices)."""
        count = len(self.bytes_per_s)
        queued = self.agents.queue_bytes[:count] + self.agents.promised[:count]
        return np.asarray(queued / self.bytes_per_s)

    def read_backlog_s(self, agent: str) -> float:
        """Of one agent: the later of its SSD and its storage NIC; infinite if unknown."""
        row = self.agents.row_of.get(agent)
        if row is None or row >= len(self.bytes_per_s):
            return np.inf
        queued = self.agents.queue_bytes[row] + self.agents.promised[row]
        return float((queued / self.bytes_per_s[row])[READING].max())
