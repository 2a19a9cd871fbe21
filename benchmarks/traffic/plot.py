"""Throughput, small messages and TPOT of every arm."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.traffic.measure import LINK_BYTES_PER_S  # noqa: E402
from benchmarks.traffic.results import Results, medians, spread  # noqa: E402

SHOWN = ("control", "classes", "pacer alone", "neither")
COLOURS = dict(zip(SHOWN, ("tab:gray", "tab:green", "tab:blue", "tab:red"), strict=True))


def draw(folder: Path, results: Results) -> None:
    """``traffic.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (rates, messages, tokens) = pyplot.subplots(1, 3, figsize=(13, 3.8))
    _rates(rates, results)
    _bars(messages, results.link, "message_p99_s", "p99 of 4 KiB messages")
    _bars(tokens, results.engine, "tpot_s", "TPOT, decode engine of 2 ranks")
    figure.tight_layout()
    figure.savefig(folder / "traffic.png", dpi=130)
    pyplot.close(figure)


def _rates(axes: Axes, results: Results) -> None:
    of = medians(results.link)
    arms = [arm for arm in (*SHOWN, *(f"{arm}, flood" for arm in SHOWN)) if arm in of]
    high = np.array([of[arm]["high_rate"] for arm in arms]) / 1e6
    # In a control arm KV moves over another link.
    kv = np.array([0 if "control" in arm else of[arm]["kv_rate"] for arm in arms]) / 1e6
    axes.barh(arms, high, label="inference", color="tab:blue")
    axes.barh(arms, kv, left=high, label="KV movement", color="tab:orange")
    axes.axvline(LINK_BYTES_PER_S / 1e6, color="black", lw=0.8)
    axes.invert_yaxis()
    axes.set(xlabel="MB/s over the link (line: its rate)", title="Who gets the link")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=2)


def _bars(axes: Axes, rounds: dict, field: str, title: str) -> None:
    of, ranges = medians(rounds), spread(rounds)
    arms = [arm for arm in SHOWN if arm in of]
    middle = np.array([of[arm][field] for arm in arms])
    bounds = np.array([ranges[arm][field] for arm in arms]).reshape(len(arms), 2)
    errors = np.abs(bounds.T - middle) * 1e3
    axes.bar(arms, middle * 1e3, yerr=errors, capsize=4, color=[COLOURS[arm] for arm in arms])
    axes.set(ylabel="ms (median, range of rounds)", title=title)
