"""Sizes as people write them: ``8GiB``."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{prefix}i": 2 ** (10 * power) for power, prefix in enumerate("KMGT", 1)}


def parse_size(value: str | int) -> int:
    """Bytes of ``8GiB``, ``512MiB``, ``1.5GB`` or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?)B?", str(value).strip(), re.IGNORECASE)
    unit = match and _UNITS.get(match[2][:1].upper() + match[2][1:].lower())
    if match is None or unit is None:
        raise ValueError(f"{value!r} is not a size; write it as 8GiB, 512MiB or a number of bytes")
    return int(float(match[1]) * unit)


def format_size(size_bytes: int) -> str:
    """The shortest exact-looking way to write a size: ``8 GiB``, ``1.5 MiB``, ``12 B``."""
    for power, prefix in reversed(list(enumerate("KMGT", 1))):
        if size_bytes >= 1 << (10 * power):
            return f"{size_bytes / (1 << (10 * power)):.4g} {prefix}iB"
    return f"{size_bytes} B"
