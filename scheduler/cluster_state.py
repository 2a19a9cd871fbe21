"""What the scheduler knows of engines and agents: their last reports, and what it has
promised on top of them.

A report is late by a heartbeat, and a decision shows in it only once the work has reached
the process. Until then the decision is kept as a *promise* and counted in, so that the
requests between two reports do not all go to the node that looked idle in the last one.

Numbers of all processes of a kind lie in one array a field, one row a process, because a
decision looks at every one of up to a thousand nodes.
"""

from __future__ import annotations

import numpy as np

from common.loads import AgentLoad, EngineLoad
from scheduler.options import SchedulerOptions
from scheduler.rows.processes import (
    DEVICE_OF,
    READING,
    Agents,
    Device,
    Engines,
    Floats,
    Mask,
    Processes,
    Rows,
)

PREFILL = "prefill"
DECODE = "decode"
DEFAULT_BYTES_PER_S = 1e9
"""Assumed of a device while none of its kind has been measured."""
RATE_TRUSTED_S = 5.0
"""A measured rate that no new measurement confirms for longer fades ..."""
RATE_FADES_S = 5.0
"""... with this time constant towards the mean of the others: a node that was slow gets
work again, and with it the measurement that says what it is worth now."""
BETA_PROBE_TOKENS = 4096
"""A prefill engine's speed is taken from a forward of so many tokens."""


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
        self._reachable: frozenset[str] = frozenset()
        self._reachable_of: tuple[frozenset[str] | None, ...] = ()
        """What it is made of."""
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
        engines.group[row] = engines.groups.number(group)
        if load.linked is not None and engines.linked.get(load.engine) != (
            linked := frozenset(load.linked)
        ):
            engines.linked[load.engine] = linked
        engines.sequences[row] = load.sequences
        engines.pending_tokens[row] = load.pending_tokens
        engines.context_tokens[row] = load.context_tokens
        engines.free_tokens[row] = load.free_tokens
        if load.prefill_cost is not None:
            engines.prefill_cost[row] = load.prefill_cost.coefficients()
            engines.window_tokens[row] = load.prefill_cost.window_tokens
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

    def reachable(self, *engines: int) -> frozenset[str]:
        """Usable agents that these engines (by row) are linked to: the very set of
        :attr:`alive_agents` where that is all of them, else the same one as long as nothing
        changes."""
        links = tuple(self.engines.linked.get(self.engines.names[row]) for row in engines)
        key = (self.alive_agents, *links)
        if len(key) != len(self._reachable_of) or any(
            one is not other for one, other in zip(key, self._reachable_of, strict=True)
        ):
            said = [linked for linked in links if linked is not None]
            reachable = self.alive_agents.intersection(*said)
            whole = len(reachable) == len(self.alive_agents)
            self._reachable = self.alive_agents if whole else reachable
            self._reachable_of = key
        return self._reachable

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
