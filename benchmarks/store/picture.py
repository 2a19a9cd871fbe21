"""Curves of a storage report: ``python -m benchmarks.store.picture REPORT FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt

from benchmarks.goals import draw_report

DPI = 110


def rates(path: Path, bytes_per_s: dict[str, dict[str, float]]) -> None:
    """Reads and writes of the SSD tier by block size, beside plain ones and SGLang's."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes = list(bytes_per_s)
    best = [
        max(rate for name, rate in of.items() if name.startswith("raw read"))
        for of in bytes_per_s.values()
    ]
    curves = {
        "read": [("SSD tier", "read"), ("SGLang's file backend", "SGLang file backend read")],
        "write": [("SSD tier, durable", "write"), ("plain writer, synced", "raw write")],
    }
    panels[0].plot(sizes, [rate / 1e9 for rate in best], "--", marker="o", label="plain reader")
    for panel, (title, lines) in zip(panels, curves.items(), strict=True):
        for label, name in lines:
            values = [of[name] / 1e9 for of in bytes_per_s.values()]
            panel.plot(sizes, values, marker="o", label=label)
        panel.set(title=title, xlabel="block", ylabel="GB/s")
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def hit_rates(path: Path, percent: dict[str, dict[str, float]]) -> None:
    """Hit rate of each rule of eviction by the size of the store."""
    figure, panel = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for rule in ("Belady", "leaf first", "LRU"):
        panel.plot(list(percent), [of[rule] for of in percent.values()], marker="o", label=rule)
    panel.set(xlabel="store, part of the working set", ylabel="hit rate, %")
    panel.set_ylim(bottom=0)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw(report: dict[str, Any], folder: Path) -> None:
    rates(folder / "store_rates.png", report["bytes_per_s"])
    hit_rates(folder / "store_hit_rates.png", report["hit_rate_percent"])


if __name__ == "__main__":
    sys.exit(draw_report(draw, __doc__))
