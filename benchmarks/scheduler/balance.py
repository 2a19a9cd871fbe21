"""How even the policies keep the storage NICs of the fluid model."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.scheduler.fluid import SAMPLE_PERIOD_S, Fluid, Workload

WINDOW_S = 10.0
WARM_UP_S = 10.0
"""All agents begin at once; this burst is not looked at."""
JOB_LIMIT_S = 3600.0
PACE_S = 1.0
"""Progress is told as often, in simulated time."""

Progress = Callable[[float], None]


class Balance(msgspec.Struct, frozen=True):
    """One policy at one load, over all windows of 10 s after the first one."""

    policy: str
    load: float
    max_avg: float
    """Bytes of the busiest NIC over the mean of all, mean of the windows ..."""
    max_avg_worst: float
    """... and the worst window."""
    use: float
    """Of what all NICs could have brought."""
    waiting_s_least: float
    """Least backlog of all NICs together, over their rate: above 0, reads always waited."""
    turns_per_s: float


def balance(
    policy: str,
    nodes: tuple[int, int],
    load: float,
    seconds: float,
    progress: Progress,
) -> tuple[Balance, NDArray[np.float64]]:
    """Also each NIC's use over time, shape (NICs, seconds): the part of its rate."""
    fluid = Fluid(policy, nodes, Workload(load))
    _run(fluid, WARM_UP_S + seconds, progress)
    samples, rate = np.array(fluid.samples).T, fluid.hardware.storage_bytes_per_s
    every = round(1 / SAMPLE_PERIOD_S)
    use = np.diff(samples[:, every - 1 :: every], prepend=0.0) / rate
    first, width = round(WARM_UP_S / SAMPLE_PERIOD_S), round(WINDOW_S / SAMPLE_PERIOD_S)
    windows = samples[:, first + width :] - samples[:, first:-width]
    max_avg = windows.max(axis=0) / windows.mean(axis=0)
    result = Balance(
        policy,
        load,
        float(max_avg.mean()),
        float(max_avg.max()),
        float(windows.mean() / WINDOW_S / rate),
        float(min(fluid.waiting[first:]) / fluid.nodes / rate),
        fluid.turns_done / fluid.clock.now,
    )
    return result, use


class JobTime(msgspec.Struct, frozen=True):
    """None: longer than the limit."""

    policy: str
    job_s: float | None
    ideal_s: float | None
    over_ideal: float | None


def job_times(
    policy: str, nodes: tuple[int, int], load: float, turns: int, slow_part: float
) -> JobTime:
    """A job with the first node's storage NIC at ``slow_part`` of its rate, and the same where
    one NIC with the rates of all reads everything: the ideal."""
    times = {}
    for pooled in (True, False):
        workload = Workload(load, turns=turns)
        fluid = Fluid(policy, nodes, workload, slowdown={0: slow_part}, pooled=pooled)
        times[pooled] = fluid.run_job(JOB_LIMIT_S)
    measured, ideal = times[False], times[True]
    ratio = measured / ideal if measured and ideal else None
    return JobTime(policy, measured, ideal, ratio)


class Step(msgspec.Struct, frozen=True):
    """The first node's storage NIC drops to a tenth of its rate, and later comes back.

    The part of what all read in a window of 10 s that it read (``read``) and was given to read
    (``given``), over the part that its rate is of all rates, in the mean of the window.
    """

    time_s: list[float]
    """Ends of the windows, 0 at the drop."""
    read: list[float]
    given: list[float]
    worst_read: float
    """Largest distance from 1, of any node, in the windows that begin between 10 s and 60 s
    after each step."""
    worst_given: float


SLOW_PART = 0.1
SETTLE_S = 10.0
STAY_S = 60.0
LEAD_S = 30.0
"""Before the drop."""
BACK_S = LEAD_S + SETTLE_S + STAY_S + WINDOW_S
"""When the rate comes back."""


def step(
    policy: str, nodes: tuple[int, int], load: float, progress: Progress, seed: int = 0
) -> Step:
    """Shares around a step of one node's rate down to a tenth and, 80 s later, up again."""
    fluid = Fluid(policy, nodes, Workload(load), seed=seed)
    fluid.clock.after(LEAD_S, fluid.set_rate, 0, SLOW_PART)
    fluid.clock.after(BACK_S, fluid.set_rate, 0, 1.0)
    agents = fluid.cluster.scheduler.state.agents
    total_s = round(BACK_S + SETTLE_S + STAY_S + WINDOW_S)
    read, given = [fluid.read_bytes()], [agents.assigned_bytes[: fluid.nodes].copy()]
    for second in range(total_s):
        fluid.run(PACE_S)
        read.append(fluid.read_bytes())
        given.append(agents.assigned_bytes[: fluid.nodes].copy())
        progress((second + 1) / total_s)
    seconds = np.arange(total_s + 1)
    rates = np.ones((len(seconds), fluid.nodes))
    rates[(seconds > LEAD_S) & (seconds <= BACK_S), 0] = SLOW_PART
    ideal = np.cumsum(rates / rates.sum(axis=1, keepdims=True), axis=0)
    begins = seconds[: -round(WINDOW_S)]
    settled = np.zeros(len(begins), bool)
    for step_s in (LEAD_S, BACK_S):
        settled |= (begins >= step_s + SETTLE_S) & (begins <= step_s + SETTLE_S + STAY_S)
    shares = [_shares(np.array(total)) / _shares(ideal) for total in (read, given)]
    worst = [float(np.abs(share[settled] - 1).max()) for share in shares]
    times = (begins + WINDOW_S - LEAD_S).tolist()
    return Step(times, shares[0][:, 0].tolist(), shares[1][:, 0].tolist(), *worst)


def _shares(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each node in each window, from totals by second, shape (seconds, nodes)."""
    windows = total[round(WINDOW_S) :] - total[: -round(WINDOW_S)]
    return np.asarray(windows / windows.sum(axis=1, keepdims=True))


def _run(fluid: Fluid, seconds: float, progress: Progress) -> None:
    steps = round(seconds / PACE_S)
    for done in range(steps):
        fluid.run(PACE_S)
        progress((done + 1) / steps)
