"""The one form in which every benchmark says what it aimed at and what it got.

``python -m benchmarks.goals OUT`` prints what one has written as the table of its page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table


class Goal(msgspec.Struct, frozen=True):
    """``value`` is at most ``at_most``, or at least ``at_least``: exactly one of them is set.

    None is a value that was not measured, which never holds.
    """

    name: str
    value: float | None
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError(f"goal {self.name!r}: give at_most or at_least")

    @property
    def holds(self) -> bool:
        if self.value is None:
            return False
        if self.at_most is not None:
            return self.value <= self.at_most
        return self.at_least is not None and self.value >= self.at_least

    @property
    def threshold(self) -> str:
        """Such as ``<= 2``."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.threshold,
            "holds": self.holds,
        }


def write_report(path: Path, goals: list[Goal], figures: dict[str, Any]) -> None:
    """One JSON file: ``goals`` at its top, everything else under names of its own."""
    path.write_text(json.dumps({"goals": [g.row() for g in goals], **figures}, indent=2) + "\n")


def markdown_table(report: dict[str, Any]) -> str:
    """Of what :func:`write_report` wrote: its goals, then its ``reported`` by name, if any."""
    lines = ["| goal | measured | threshold | holds |", "| --- | --- | --- | --- |"]
    for goal in report["goals"]:
        unit = " s" if goal["unit"] == "s" else ""  # others' are in the name
        value = "-" if goal["value"] is None else f"{goal['value']:,.3g}{unit}"
        holds = "yes" if goal["holds"] else "**no**"
        lines.append(f"| {goal['name']} | {value} | {goal['goal']}{unit} | {holds} |")
    for name, value in report.get("reported", {}).items():
        lines.append(f"| {name} | {value} | reported | |")
    return "\n".join(lines)


def draw_report(draw: Callable[[dict[str, Any], Path], None], usage: str | None) -> int:
    """``main`` of a module that draws: with REPORT and FOLDER on the command line, ``draw`` gets
    what :func:`write_report` wrote, and the folder; else the usage is shown. Exit status."""
    if len(sys.argv) != 3:
        print(usage, file=sys.stderr)
        return 2
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
    return 0


def goals_table(goals: Sequence[Goal]) -> Table:
    """For the console: each goal with what was measured."""
    table = Table("goal", "measured", "unit", "threshold", "holds", title="Goals")
    for goal in goals:
        value = "-" if goal.value is None else f"{goal.value:,.4g}"
        mark = "yes" if goal.holds else "[red]no"
        table.add_row(goal.name, value, goal.unit, goal.threshold, mark)
    return table


if __name__ == "__main__":
    print(markdown_table(json.loads(Path(sys.argv[1]).read_text())))
