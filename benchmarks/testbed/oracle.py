"""The zero-I/O bound of the paper's evaluation. No product has it by name: a cluster has to be
started with this class as its path policy."""

from __future__ import annotations

from common.experiment import Experiment
from scheduler.one_reader import OneSide

ORACLE_CLASS = "benchmarks.testbed.oracle:Oracle"


class Oracle(OneSide):
    """As if P's side had every hit block delivered for nothing. Tokens are wrong by design."""

    experiment = Experiment(zero_io=True)

    def __init__(self) -> None:
        super().__init__("prefill")
