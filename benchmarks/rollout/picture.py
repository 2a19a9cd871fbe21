"""Requests in flight over a job: ``python -m benchmarks.rollout.picture REPORT FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.goals import draw_report

DPI = 110


def in_flight(path: Path, report: dict[str, Any]) -> None:
    """Of the job of many episodes, and of one whose longest rows come last, by order."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    episodes = report["episodes"]
    title = "{prompts} prompts x {samples} samples x {turns} turns".format(**episodes)
    curves = {
        title: {"": episodes["summary"]},
        "long prompts at the end of the input": report["orders"],
    }
    for panel, (name, jobs) in zip(panels, curves.items(), strict=True):
        for label, summary in jobs.items():
            use = summary["utilisation"]
            edges_s = np.arange(len(use["in_flight"]) + 1) * use["step_s"]
            edges_s[-1] = max(summary["seconds"], edges_s[-2])
            panel.stairs(use["in_flight"], edges_s, label=label and f"--order {label}")
        panel.set(title=name, xlabel="time of the job, s")
        panel.set_ylim(bottom=0)
    panels[0].set(ylabel="requests in flight")
    panels[1].legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw(report: dict[str, Any], folder: Path) -> None:
    in_flight(folder / "rollout_in_flight.png", report)


if __name__ == "__main__":
    sys.exit(draw_report(draw, __doc__))
