"""What a run leaves behind: a table on the console, raw rows as Parquet, a picture a shape."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.testbed.results import ORACLE, Run, ShapeResult

WINDOW_S = 0.5
"""Of the picture's mean rates."""
TIMINGS = ("queue", "slots", "read", "plan", "deliver", "prefill", "first_byte", "total")
"""Of the gateway's trace (launch/gateway/request/trace.py); the oracle has no delivery."""


def arms_table(results: Sequence[ShapeResult]) -> Table:
    """A row for each arm of each shape; medians over the rounds."""
    names = (
        "shape",
        "arm",
        "job, s",
        "gain",
        "of B",
        "NIC Max/Avg",
        "hit, %",
        "read/hit",
        "CPU, %",
    )
    table = Table(*names, title="Offline jobs")
    for result in results:
        for arm, of in result.figures()["arms"].items():
            bound = result.bound
            share = of["gain_over_basic"] / bound if bound and of["gain_over_basic"] else None
            ratios = of["storage_over_hit_bytes"]
            table.add_row(
                *(result.shape.name, arm, _number(of["job_s"], 1)),
                *(_number(of["gain_over_basic"], 2), "" if arm == ORACLE else _number(share, 2)),
                *(_number(of["nic_max_over_average"], 3), _number(100 * of["hit_rate"], 1)),
                _number(max(ratios, key=lambda ratio: abs(ratio - 1)), 3),
                _number(100 * of["cpu_share"], 0),
                style=None if of["is_valid"] else "red",
            )
        table.add_section()
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# ---- raw rows -----------------------------------------------------------------------------------


def write_parquet(folder: Path, stem: str, results: Sequence[ShapeResult]) -> list[Path]:
    """``STEM.turns.parquet``, a row for each request, and ``STEM.nics.parquet``, one for each
    node at each sample. Returns the paths."""
    import pyarrow
    import pyarrow.parquet

    paths = []
    for name, rows in (("turns", _turn_rows(results)), ("nics", _nic_rows(results))):
        paths.append(folder / f"{stem}.{name}.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), paths[-1])
    return paths


def _runs(results: Sequence[ShapeResult]) -> Iterator[tuple[dict[str, Any], Run]]:
    for result in results:
        for run in result.runs:
            yield {"shape": result.shape.name, "arm": run.arm, "round": run.round}, run


def _turn_rows(results: Sequence[ShapeResult]) -> Iterator[dict[str, Any]]:
    for labels, run in _runs(results):
        for turn in run.job.turns:
            yield labels | {
                "agent": turn.agent,
                "turn": turn.turn,
                "sent_s": turn.sent_s - run.job.begun_s,
                "done_s": turn.done_s - run.job.begun_s,
                "prompt_tokens": turn.prompt_tokens,
                "hit_bytes": turn.hit_bytes,
                "read_bytes": turn.read_bytes,
                "prefill": turn.trace["prefill"],
                "decode": turn.trace["decode"],
                "readers": json.dumps(turn.trace["readers"]),
                **{f"{name}_s": turn.trace["timings_s"].get(name) for name in TIMINGS},
            }


def _nic_rows(results: Sequence[ShapeResult]) -> Iterator[dict[str, Any]]:
    for labels, run in _runs(results):
        use = run.nics
        for when, received in zip(use.times_s.tolist(), use.received_bytes.tolist(), strict=True):
            for node, received_bytes in zip(use.nodes, received, strict=True):
                yield labels | {"time_s": when, "node": node, "received_bytes": received_bytes}


# ---- the picture --------------------------------------------------------------------------------


def draw(folder: Path, result: ShapeResult) -> Path:
    """One row for each arm: every storage NIC's rate over the time of its median job."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [_median_run(result.of(arm)) for arm in dict.fromkeys(r.arm for r in result.runs)]
    figure, axes = pyplot.subplots(
        len(runs), figsize=(9, 1.5 * len(runs) + 1), sharex=True, sharey=True, squeeze=False
    )
    for axis, run in zip(axes[:, 0], runs, strict=True):
        times_s, rates = run.nics.rates(WINDOW_S)
        for node, column in zip(run.nics.nodes, rates.T, strict=True):
            dashes = "-" if node.startswith("p") else "--"
            axis.plot(times_s, column * 8 / 1e6, dashes, label=node, linewidth=1.2)
        axis.axvline(run.job.seconds, color="grey", linewidth=0.8)
        axis.set_ylabel(f"{run.arm}\nMbit/s", fontsize=8)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(ncols=len(result.shape.nodes), fontsize=8, loc="upper right")
    axes[0, 0].set_title(
        f"{result.shape.name}: storage NICs, received (grey line: the job's end)", fontsize=10
    )
    axes[-1, 0].set_xlabel("seconds since the job's begin")
    figure.tight_layout()
    path = folder / f"testbed_{result.shape.name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _median_run(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run.job.seconds)[len(runs) // 2]
