"""KV bytes held over time, and what forwards wait for at each layer."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

from benchmarks.layer_window.arms import LAYERS, WINDOW  # noqa: E402
from benchmarks.layer_window.measure import Results  # noqa: E402

NAMES = {
    "all": "all layers",
    "window": f"{WINDOW} of {LAYERS} layers",
    "whole": "all layers, loaded before the forward",
}


def draw(folder: Path, results: Results) -> None:
    """``layer_window.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, (held, waits) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for arm, samples in results.held_bytes.items():
        held.plot([t for t, _ in samples], [b / 2**20 for _, b in samples], label=NAMES[arm])
    held.set(xlabel="s", ylabel="MiB of KV in use", title="16 requests at once, equal pool bytes")
    held.set_ylim(bottom=0)
    held.legend()
    for label, wait, offset in (
        ("open link", results.open_wait, -0.2),
        ("half the rate needed", results.slow_wait, 0.2),
    ):
        if wait is not None:
            layers = [layer + offset for layer in range(LAYERS)]
            waits.bar(layers, [s * 1e3 for s in wait.per_layer_s], width=0.4, label=label)
    waits.set(xlabel="layer", ylabel="ms", title="Wait for KV, one request")
    waits.legend()
    figure.tight_layout()
    figure.savefig(folder / "layer_window.png", dpi=130)
