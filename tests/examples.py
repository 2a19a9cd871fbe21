"""How many random examples a test tries: all by default, a part in the quick loop."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings

PART = 0.2 if os.environ.get("EXAMPLES") == "few" else 1.0
"""``make check`` sets EXAMPLES=few; ``make test`` tries all."""


def examples(count: int = 100, **more: Any) -> settings:
    """Hypothesis's settings for ``count`` examples, each of which may take its time."""
    return settings(max_examples=max(5, round(PART * count)), deadline=None, **more)
