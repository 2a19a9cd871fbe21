"""Pictures of what the fluid model's storage NICs did."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from benchmarks.scheduler.balance import Balance, Step

DPI = 110


def nic_use(
    path: Path, uses: list[tuple[Balance, NDArray[np.float64]]], nodes: tuple[int, int]
) -> None:
    """One panel a policy: NICs from top to bottom (prefill nodes first), time to the right,
    use by colour."""
    figure, panels = plt.subplots(
        len(uses), 1, figsize=(9, 1.6 * len(uses) + 0.8), sharex=True, layout="constrained"
    )
    for panel, (result, use) in zip(panels, uses, strict=True):
        image = panel.imshow(
            use, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest"
        )
        panel.axhline(nodes[0] - 0.5, color="white", linewidth=0.8)
        panel.set_yticks([nodes[0] / 2, nodes[0] + nodes[1] / 2], ["prefill", "decode"])
        panel.set_title(
            f"{result.policy}: {result.use:.0%} of all NICs used, Max/Avg {result.max_avg:.2f}, "
            f"{result.turns_per_s:.0f} turns/s",
            loc="left",
            fontsize=10,
        )
    panels[-1].set_xlabel("simulated time, s")
    figure.colorbar(image, ax=panels, label="use of a storage NIC", shrink=0.6)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def step_response(path: Path, result: Step, back_s: float) -> None:
    """The share of the node whose rate drops and comes back, over its ideal share."""
    figure, panel = plt.subplots(figsize=(9, 3.2), layout="constrained")
    panel.axhspan(0.9, 1.1, color="0.9", label="within 10 % of ideal")
    panel.plot(result.time_s, result.given, label="given to read")
    panel.plot(result.time_s, result.read, label="read")
    for time_s, text in ((0.0, "a tenth of the rate"), (back_s, "full rate again")):
        panel.axvline(time_s, color="0.4", linestyle=":")
        panel.annotate(text, (time_s, 0.02), xytext=(4, 0), textcoords="offset points")
    panel.set(xlabel="end of the 10 s window, s after the drop", ylabel="share over ideal")
    panel.set_ylim(0, 2)
    panel.legend(loc="upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
