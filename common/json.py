"""JSON of a shape that is not known here: whoever takes a value out looks what it is."""

from __future__ import annotations

JsonObject = dict[str, object]
