"""Which prefill and which decode engine a request goes to: the paper's rules.

DualPath, arXiv 2602.21548, section 6.1. Engines of one group report as one.
"""

from __future__ import annotations

import numpy as np

from scheduler.cluster_state import DECODE, PREFILL, ClusterState, Device, Floats, Mask, Rows
from scheduler.plan import NoEngine, PlanRequest

BETA_PROBE_TOKENS = 4096
"""A prefill engine's speed is taken from a forward of so many tokens."""


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
            tried = ", ".join(sorted(names.values()))
            raise NoEngine(role, f"it already failed on every one that is alive ({tried})")
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
    the request stays in the global queue: ``NoEngine``, transient.
    """
    engines = state.engines
    rows = candidates(state, PREFILL, request)
    pending = engines.pending_tokens[rows] + engines.promised[rows, engines.TOKENS]
    below_beta = pending <= beta_tokens(state, rows)
    if not below_beta.any():
        raise NoEngine(PREFILL, f"{pending.min():.0f} tokens pend on each", transient=True)
    rows, pending = rows[below_beta], pending[below_beta]
    long_queue = read_queue_bytes(state, rows) > alpha_bytes(state, rows)
    order = np.lexsort((engines.last_chosen[rows], pending, long_queue))
    return int(rows[order[0]])


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
    totals = np.bincount(groups, weights=tokens)
    chosen = engines.last_chosen[rows]
    first = np.lexsort((chosen, totals[groups]))[0]
    members = groups == groups[first]
    rows, tokens, chosen = rows[members], tokens[members], chosen[members]
    limit = state.options.decode_balance * (tokens.sum() + needed) / len(rows)
    sequences = engines.sequences[rows] + engines.promised[rows, engines.SEQUENCES]
    over = tokens + needed > limit
    rank = np.where(over, tokens, sequences)
    return int(rows[np.lexsort((chosen, rank, over))[0]])


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


# ---- the paper's constants, from measurement ----------------------------------------------


def beta_tokens(state: ClusterState, rows: Rows) -> Floats:
    """What each prefill engine computes in beta seconds; infinite while not measured."""
    options, engines = state.options, state.engines
    if options.beta_tokens:
        return np.full(len(rows), float(options.beta_tokens))
    pairs = BETA_PROBE_TOKENS**2 / 2
    probe_s = engines.base_s[rows] + BETA_PROBE_TOKENS * engines.token_s[rows]
    probe_s = probe_s + pairs * engines.pair_s[rows]
    with np.errstate(divide="ignore"):
        return np.asarray(options.beta_s * BETA_PROBE_TOKENS / probe_s)


def alpha_bytes(state: ClusterState, rows: Rows) -> Floats:
    """What the agent of each engine's node reads from remote storage in alpha seconds."""
    if state.options.alpha_bytes:
        return np.full(len(rows), float(state.options.alpha_bytes))
    agents = state.engines.agent_row[rows]
    return np.asarray(state.options.alpha_s * _of_agents(state, agents, state.bytes_per_s))


def read_queue_bytes(state: ClusterState, rows: Rows) -> Floats:
    """Read queue of the storage NIC of each engine's node."""
    agents = state.engines.agent_row[rows]
    count = len(state.bytes_per_s)
    queued = state.agents.queue_bytes[:count] + state.agents.promised[:count]
    return _of_agents(state, agents, queued)


def _of_agents(state: ClusterState, agents: Rows, values: Floats) -> Floats:
    """Storage-NIC column for these agents; 0 for one that has not reported yet."""
    known = agents < len(values)
    found = np.zeros(len(agents))
    found[known] = values[agents[known], Device.STORAGE_NIC]
    return found
