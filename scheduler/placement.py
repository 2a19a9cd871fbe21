"""Which prefill and which decode engine a request goes to: the paper's rules.

DualPath, arXiv 2602.21548, section 6.1. Engines of one group report as one.
"""

from __future__ import annotations

import numpy as np

from scheduler.cluster_state import DECODE, PREFILL, ClusterState
from scheduler.plan import NoEngine, PlanRequest
from scheduler.rows.processes import Device, Floats, Mask, Rows


def candidates(state: ClusterState, role: str, request: PlanRequest) -> Rows:
    """Rows of the engines that may take the request; raises ``NoEngine`` if there is none."""
    engines = state.engines
    alive = state.engine_rows[role]
    if not len(alive):
        raise NoEngine(role, "none is alive and taking requests")
    if request.excluded or request.avoided:
        names = {row: engines.names[row] for row in alive.tolist()}
        usable = [row for row, name in names.items() if name not in request.excluded]
        if not usable:
            alive_names = ", ".join(sorted(names.values()))
            raise NoEngine(role, f"it may go to none of those that are alive ({alive_names})")
        preferred = [row for row in usable if names[row] not in request.avoided]
        alive = np.array(preferred or usable, np.intp)
    return alive


def in_turn(state: ClusterState, role: str, request: PlanRequest) -> int:
    """Row of the engine that was chosen longest ago: no scheduler at all."""
    rows = candidates(state, role, request)
    if role == DECODE:
        rows = rows[_fit(state, rows, request)]
    return int(rows[np.argmin(state.engines.last_chosen[rows])])


def choose_prefill(state: ClusterState, request: PlanRequest) -> int:
    """Row of the prefill engine.

    Engines with more than beta pending tokens take nothing; of the others those with a short
    read queue (up to alpha) come first, and among them the fewest pending tokens. With none,
    the request stays in the global queue: ``NoEngine``, transient. Where every queue is long,
    which the paper leaves open, those up to alpha longer than the shortest count as short:
    pending tokens leave out the hits, so they alone do not keep long queues alike.
    """
    engines = state.engines
    rows = candidates(state, PREFILL, request)
    pending = engines.pending_tokens[rows] + engines.promised[rows, engines.TOKENS]
    below_beta = pending <= state.beta_tokens[rows]
    if not below_beta.any():
        raise NoEngine(PREFILL, f"{pending.min():.0f} tokens pend on each", transient=True)
    nodes, nic = engines.agent_row[rows], Device.STORAGE_NIC
    read_queue = state.agents.queue_bytes[nodes, nic] + state.agents.promised[nodes, nic]
    alpha = state.alpha_bytes[rows]
    preferred = below_beta & (read_queue <= alpha)
    if not preferred.any():
        preferred = below_beta & (read_queue <= read_queue[below_beta].min() + alpha)
    return _least(state, rows[preferred], pending[preferred])


def _least(state: ClusterState, rows: Rows, rank: Floats) -> int:
    """The row of the least rank; of equals, the one that was chosen longest ago."""
    equals = rows[rank == rank.min()]
    return int(equals[state.engines.last_chosen[equals].argmin()])


def choose_decode(state: ClusterState, request: PlanRequest) -> int:
    """Row of the decode engine.

    The group that holds the fewest tokens; in it, among engines up to Z times the group's
    mean and with KV room, the fewest sequences; failing that, the fewest tokens.
    """
    engines = state.engines
    rows = candidates(state, DECODE, request)
    rows = rows[_fit(state, rows, request)]
    needed = request.prompt_tokens + request.max_new_tokens
    tokens = engines.context_tokens[rows] + engines.promised[rows, engines.CONTEXT]
    groups = engines.group[rows]
    totals = np.bincount(groups, weights=tokens).astype(np.float64, copy=False)
    members = groups == engines.group[_least(state, rows, totals[groups])]
    rows, tokens = rows[members], tokens[members]
    limit = state.options.decode_balance * (tokens.sum() + needed) / len(rows)
    within = tokens + needed <= limit
    if not within.any():
        return _least(state, rows, tokens)
    rows = rows[within]
    sequences = engines.sequences[rows] + engines.promised[rows, engines.SEQUENCES]
    return _least(state, rows, sequences)


def _fit(state: ClusterState, rows: Rows, request: PlanRequest) -> Mask:
    """Engines with KV room for prompt and answer; raises ``NoEngine`` if there is none.

    An idle engine is always fit: what it cannot hold it refuses itself, with its own
    limits, instead of leaving the request to wait for ever.
    """
    engines = state.engines
    needed = request.prompt_tokens + request.max_new_tokens
    room = engines.free_tokens[rows] - engines.promised[rows, engines.CONTEXT]
    idle = engines.sequences[rows] + engines.promised[rows, engines.SEQUENCES] == 0
    fit = (room >= needed) | idle
    if not fit.any():
        reason = f"{needed} KV tokens needed, {room.max():.0f} free at most"
        raise NoEngine(DECODE, reason, transient=True)
    return np.asarray(fit)
