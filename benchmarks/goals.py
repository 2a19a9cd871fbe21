"""The one form in which every benchmark says what it aimed at and what it got."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec


class Goal(msgspec.Struct, frozen=True):
    """``value`` is within its bounds; None where it was not measured, which never holds."""

    name: str
    value: float | None
    unit: str
    at_most: float = math.inf
    at_least: float = -math.inf

    @property
    def holds(self) -> bool:
        return self.value is not None and self.at_least <= self.value <= self.at_most

    @property
    def bounds(self) -> str:
        """As text, e.g. ``<= 1.05``."""
        bounds = [f"<= {self.at_most:g}"] if self.at_most < math.inf else []
        return " and ".join(
            bounds + ([f">= {self.at_least:g}"] if self.at_least > -math.inf else [])
        )

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "goal": self.bounds,
            "holds": self.holds,
        }


def write_report(path: Path, goals: list[Goal], figures: dict[str, Any]) -> None:
    """One JSON file: ``goals`` at its top, everything else under names of its own."""
    path.write_text(json.dumps({"goals": [g.row() for g in goals], **figures}, indent=2) + "\n")
