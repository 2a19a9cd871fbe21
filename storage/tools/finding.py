"""What ``doctor`` says of one thing that it has looked at."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import msgspec


class Verdict(str, Enum):
    GOOD = "ok"
    DOUBTFUL = "warning"
    BAD = "bad"


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at; ``advice`` says what to do about it."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""


Findings = Iterator[Finding]
