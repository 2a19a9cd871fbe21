"""Nodes and requests over time."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from benchmarks.clients.load import RIGHT, TIE  # noqa: E402
from benchmarks.elastic.hosts import GATEWAYS  # noqa: E402
from benchmarks.elastic.steps import AT_FIRST, DRAIN, GATEWAY, JOIN, NODES  # noqa: E402
from benchmarks.elastic.verdict import Done, Records, gives_work, is_cut  # noqa: E402

STARTING, SERVING, DRAINING, AWAY = "tab:olive", "tab:green", "tab:orange", "tab:red"
COLOURS = {"answered": "tab:blue", "cut by a kill": "tab:orange", "failed": "red"}


def draw(folder: Path, records: Records) -> None:
    """``elastic.png``: what each node was, and how long requests took."""
    folder.mkdir(parents=True, exist_ok=True)
    if not records.answers:
        return
    begun_s = min(answer.sent_s for answer in records.answers)
    end_s = max(answer.done_s for answer in records.answers) - begun_s
    figure, (nodes, requests) = pyplot.subplots(2, 1, figsize=(13, 6.5), sharex=True)
    _nodes(nodes, records, begun_s, end_s)
    _requests(requests, records, begun_s)
    figure.tight_layout()
    figure.savefig(folder / "elastic.png", dpi=130)
    pyplot.close(figure)


def _nodes(axes: Axes, records: Records, begun_s: float, end_s: float) -> None:
    rows = [*NODES, GATEWAYS[0]]
    for row, name in enumerate(rows):
        done = [d for d in records.done if (d.step.node or GATEWAYS[0]) == name]
        serving_s = 0.0 if name in (*AT_FIRST, GATEWAYS[0]) else None
        for each in done:
            since_s, until_s = each.begun_s - begun_s, each.ended_s - begun_s
            if serving_s is not None:
                axes.barh(row, since_s - serving_s, left=serving_s, color=SERVING)
            axes.barh(row, max(until_s - since_s, 1.0), left=since_s, color=_colour(each))
            serving_s = until_s if each.step.kind in (JOIN, GATEWAY) else None
        if serving_s is not None:
            axes.barh(row, end_s - serving_s, left=serving_s, color=SERVING)
        working = [a for a in records.answers if name in NODES and gives_work(a, name)]
        shares_s = [answer.done_s - begun_s for answer in working]
        axes.plot(shares_s, [row] * len(shares_s), "|", color="black", alpha=0.4, markersize=10)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_title("Green: serves; olive: starts; orange: drains; red: killed. Lines: its requests")
    axes.invert_yaxis()


def _colour(done: Done) -> str:
    return {JOIN: STARTING, DRAIN: DRAINING}.get(done.step.kind, AWAY)


def _requests(axes: Axes, records: Records, begun_s: float) -> None:
    kinds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in COLOURS}
    for answer in records.answers:
        good = answer.outcome in (RIGHT, TIE)
        kind = "answered" if good else "cut by a kill" if is_cut(records, answer) else "failed"
        kinds[kind].append((answer.done_s - begun_s, answer.done_s - answer.sent_s))
    for kind, points in kinds.items():
        if points:
            label = f"{kind}: {len(points)}"
            axes.plot(*zip(*points, strict=True), ".", color=COLOURS[kind], label=label)
    axes.set(xlabel="s", ylabel="s a request took")
    axes.legend(loc="upper right")
