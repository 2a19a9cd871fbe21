"""The cluster's state as JSON-able records, for operators."""

from __future__ import annotations

from typing import TypedDict

from common.ids import Incarnation
from scheduler.cluster_state import DECODE, PREFILL, ClusterState
from scheduler.rows.processes import DEVICE_OF, READING, Device, Processes


class ProcessView(TypedDict):
    """What is known of every process; ``usable``: it may be given new work."""

    name: str
    incarnation: Incarnation
    alive: bool
    draining: bool
    usable: bool
    last_seen_s: float


class EngineView(ProcessView):
    """``load_...`` and ``room_tokens`` count in what was promised since the last report."""

    role: str
    agent: str
    group: str
    sequences: int
    pending_tokens: int
    context_tokens: int
    free_tokens: int
    load_tokens: int
    load_sequences: int
    room_tokens: int
    prefill_tokens_per_s: float
    idle: bool


class AgentView(ProcessView):
    """Queues and backlogs count in what was promised; rates are those reckoned with."""

    read_queue_bytes: dict[str, int]
    read_bytes_per_s: dict[str, float]
    measured_read_bytes_per_s: dict[str, float]
    backlog_bytes: int
    backlog_s: float
    deliver_queue_bytes: int
    deliver_bytes_per_s: float
    dram_slots: int
    dram_slots_free: int
    share_bytes_total: int
    idle: bool


class ClusterView(TypedDict):
    """The scheduler and all that it knows of."""

    policy: str
    load_policy: str
    open_plans: int
    directory_blocks: int
    directory_dropped_total: int
    engines: list[EngineView]
    agents: list[AgentView]


def _common(
    processes: Processes, row: int, usable: bool, now: float, limit_s: float
) -> ProcessView:
    silent_s = now - float(processes.last_seen_s[row])
    return {
        "name": processes.names[row],
        "incarnation": processes.incarnation[row],
        "alive": silent_s <= limit_s,
        "draining": bool(processes.draining[row]),
        "usable": usable,
        "last_seen_s": silent_s,
    }


def engines(state: ClusterState, now: float) -> list[EngineView]:
    """One record an engine that has ever reported."""
    known, limit_s = state.engines, state.options.heartbeat_timeout_s
    views: list[EngineView] = []
    for row in sorted(known.row_of.values()):
        tokens, sequences, context = known.promised[row].tolist()
        usable = bool(state.usable_engines[row])
        pending, held = known.pending_tokens[row] + tokens, known.sequences[row] + sequences
        speed_s = float(known.token_s[row])
        views.append(
            {
                **_common(known, row, usable, now, limit_s),
                "role": PREFILL if known.is_prefill[row] else DECODE,
                "agent": state.agents.names[known.agent_row[row]],
                "group": known.groups.listed[known.group[row]],
                "sequences": int(known.sequences[row]),
                "pending_tokens": int(known.pending_tokens[row]),
                "context_tokens": int(known.context_tokens[row]),
                "free_tokens": int(known.free_tokens[row]),
                "load_tokens": int(pending),
                "load_sequences": int(held),
                "room_tokens": int(known.free_tokens[row] - context),
                "prefill_tokens_per_s": 1 / speed_s if speed_s else 0.0,
                "idle": not held,
            }
        )
    return views


def agents(state: ClusterState, now: float) -> list[AgentView]:
    """One record an agent that has ever reported, or whose engine has."""
    known, limit_s = state.agents, state.options.heartbeat_timeout_s
    backlog_s = state.backlog_s()
    views: list[AgentView] = []
    for row in sorted(known.row_of.values()):
        queued = (known.queue_bytes[row] + known.promised[row]).tolist()
        out = Device.COMPUTE_OUT
        views.append(
            {
                **_common(known, row, bool(state.usable_agents[row]), now, limit_s),
                "read_queue_bytes": {t.value: int(queued[d]) for t, d in DEVICE_OF.items()},
                "read_bytes_per_s": _by_tier(state.bytes_per_s[row].tolist()),
                "measured_read_bytes_per_s": _by_tier(known.measured_bytes_per_s[row].tolist()),
                "backlog_bytes": int(sum(queued[READING])),
                "backlog_s": float(backlog_s[row, READING].max()),
                "deliver_queue_bytes": int(queued[out]),
                "deliver_bytes_per_s": float(state.bytes_per_s[row, out]),
                "dram_slots": int(known.dram_slots[row]),
                "dram_slots_free": int(known.dram_slots_free[row]),
                "share_bytes_total": int(known.assigned_bytes[row]),
                "idle": not sum(queued),
            }
        )
    return views


def _by_tier(values: list[float]) -> dict[str, float]:
    return {tier.value: values[device] for tier, device in DEVICE_OF.items()}
