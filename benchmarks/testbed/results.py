"""What the arms' jobs mean: medians, ratios of pairs, and the goals. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import msgspec

from benchmarks.goals import Goal
from benchmarks.testbed.nic_use import NicUse
from benchmarks.testbed.workload import Job

BASIC, N_WAY, ORACLE = "prefill", "n-way", "oracle"
DUAL = ("round-robin", "shorter-queue", "split", N_WAY)
ARMS = (BASIC, *DUAL, ORACLE)
MIDDLE = 0.8
RATIO_TOLERANCE = 0.02
LONG_HIT_SLACK = 1.25
IO_BOUND = 1.3
"""Where Basic/Oracle is this many times (P + D)/P, the NICs alone are the limit."""


class Shape(msgspec.Struct, frozen=True):
    """How many nodes of each kind."""

    prefill: int
    decode: int

    @property
    def name(self) -> str:
        return f"{self.prefill}P{self.decode}D"

    @property
    def nodes(self) -> list[str]:
        """Prefill nodes first."""
        return [f"p{i}" for i in range(self.prefill)] + [f"d{i}" for i in range(self.decode)]


class Run(msgspec.Struct):
    """One arm's job in one round."""

    arm: str
    round: int
    job: Job
    nics: NicUse
    storage_bytes: float
    """That agents have read from the remote store, by their own count."""
    differing: int
    cpu_share: float
    """Of all cores of the machine, by everything that ran."""

    @property
    def storage_over_hit(self) -> float:
        """1 when every hit byte was read from the remote store once."""
        return self.storage_bytes / max(self.job.hit_bytes, 1)

    @property
    def is_valid(self) -> bool:
        """The oracle reads nothing; every other arm reads just the hit."""
        if self.arm == ORACLE:
            return self.storage_bytes == 0
        return abs(self.storage_over_hit - 1) <= RATIO_TOLERANCE


class ShapeResult(msgspec.Struct):
    """All that was measured with one shape. Rates are bytes a second."""

    shape: Shape
    runs: list[Run]
    storage_iperf: dict[str, float]
    compute_iperf: dict[str, float]
    long_hit_s: dict[str, list[float]]
    """Delivery times by policy; the i-th ones were measured one after the other."""

    def of(self, arm: str) -> list[Run]:
        """The arm's runs by round."""
        return sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.round)

    def figure(self, arm: str, value: Callable[[Run], float]) -> float | None:
        """Median over the rounds; None without any."""
        values = [value(run) for run in self.of(arm)]
        return median(values) if values else None

    def gain(self, arm: str, over: str = BASIC) -> float | None:
        """How many times faster than ``over``: median of the rounds' ratios."""
        pairs = zip(self.of(over), self.of(arm), strict=False)
        return _median([before.job.seconds / after.job.seconds for before, after in pairs])

    def balance(self, arm: str) -> float | None:
        """Max/Avg of the storage NICs' bytes; the oracle has none."""
        if arm == ORACLE:
            return None
        return self.figure(arm, lambda run: run.nics.max_over_average())

    # ---- what physics allows ------------------------------------------------------------

    @property
    def pool(self) -> float:
        """(P + D)/P: so many times more storage NICs than Basic uses."""
        return len(self.shape.nodes) / self.shape.prefill

    @property
    def bound(self) -> float | None:
        """B of the issue: no arm can gain more over Basic."""
        oracle = self.gain(ORACLE)
        return None if oracle is None else min(self.pool, oracle)

    @property
    def bound_share_wanted(self) -> float:
        """How much of B the best arm is to reach."""
        oracle = self.gain(ORACLE)
        return 0.9 if oracle is not None and oracle >= IO_BOUND * self.pool else 0.8

    def best(self) -> tuple[str, float] | None:
        """The arm that gained most, and how much."""
        gains = [(arm, gain) for arm in DUAL if (gain := self.gain(arm)) is not None]
        return max(gains, key=lambda pair: pair[1], default=None)

    def basic_use(self, run: Run) -> float:
        """The least busy prefill node's storage NIC in the middle of the job, as a share of
        what iperf3 got over it."""
        rates = dict(zip(run.nics.nodes, run.nics.middle_rates(MIDDLE).tolist(), strict=True))
        prefill = self.shape.nodes[: self.shape.prefill]
        return min(rates[node] / self.storage_iperf[node] for node in prefill)

    # ---- goals --------------------------------------------------------------------------

    def goals(self) -> list[Goal]:
        """Those of the issue, each with its threshold for this shape."""
        best, bound = self.best(), self.bound
        share = best[1] / bound if best is not None and bound is not None else None
        real = [run for run in self.runs if run.arm != ORACLE]
        off = max((abs(run.storage_over_hit - 1) for run in real), default=None)
        differing = sum(run.differing for run in real) if real else None
        return [
            self._goal("best arm's gain over Basic / B", share, at_least=self.bound_share_wanted),
            self._goal(
                "Basic's prefill storage NICs / iperf3, middle 80 %",
                self.figure(BASIC, self.basic_use),
                at_least=0.95,
            ),
            self._goal(
                "n-way storage-NIC Max/Avg",
                self.balance(N_WAY),
                at_most=1.05,
            ),
            self._goal(
                "one long hit, n-way delivery time / Basic's",
                self.long_hit_ratio(),
                at_most=LONG_HIT_SLACK / len(self.shape.nodes),
            ),
            self._goal("answers that differ between arms", differing, "answers", at_most=0),
            self._goal("|storage bytes / hit bytes - 1|, worst", off, at_most=RATIO_TOLERANCE),
        ]

    def _goal(self, name: str, value: float | None, unit: str = "ratio", **limit: float) -> Goal:
        return Goal(f"{self.shape.name}: {name}", value, unit, **limit)

    def long_hit_ratio(self) -> float | None:
        """Delivery time of one long hit with n-way over Basic's: median of the pairs."""
        pairs = zip(self.long_hit_s.get(N_WAY, ()), self.long_hit_s.get(BASIC, ()), strict=False)
        return _median([n_way_s / basic_s for n_way_s, basic_s in pairs])

    def figures(self) -> dict[str, Any]:
        """Everything else, by arm; medians over the rounds."""
        arms = {}
        for arm in dict.fromkeys(run.arm for run in self.runs):
            arms[arm] = {
                "job_s": self.figure(arm, lambda run: run.job.seconds),
                "job_s_of_round": [run.job.seconds for run in self.of(arm)],
                "gain_over_basic": self.gain(arm),
                "hit_rate": self.figure(arm, lambda run: run.job.hit_rate),
                "storage_over_hit_bytes": [run.storage_over_hit for run in self.of(arm)],
                "is_valid": all(run.is_valid for run in self.of(arm)),
                "answers_differing": sum(run.differing for run in self.of(arm)),
                "cpu_share": self.figure(arm, lambda run: run.cpu_share),
                "nic_max_over_average": self.balance(arm),
                "nic_bytes_of_round": [
                    dict(zip(run.nics.nodes, run.nics.bytes_by_node().tolist(), strict=True))
                    for run in self.of(arm)
                ],
            }
        return {
            "pool": self.pool,
            "bound": self.bound,
            "best_arm": self.best(),
            "storage_iperf_bytes_per_s": self.storage_iperf,
            "compute_iperf_bytes_per_s": self.compute_iperf,
            "long_hit_s": self.long_hit_s,
            "arms": arms,
        }


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
