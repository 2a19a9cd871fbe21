"""How a process gets its settings: one typed struct, as JSON in one environment variable.

The launcher writes it into the process record; the process reads it once at start.
"""

from __future__ import annotations

import os
from typing import TypeVar

import msgspec

from common.ids import Incarnation

T = TypeVar("T", bound=msgspec.Struct)

INCARNATION = "DUALPATH_INCARNATION"
"""Start time of the process in ms, set by the supervisor at every (re)start."""

RUN_FOLDER = "DUALPATH_RUN_FOLDER"
"""A folder that lasts as long as the cluster, set by the supervisor."""


class BadSettings(Exception):
    """The variable is missing or does not hold the struct."""


def to_env(settings: msgspec.Struct) -> str:
    """The JSON that :func:`from_env` reads back."""
    return msgspec.json.encode(settings).decode()


def from_env(variable: str, kind: type[T]) -> T:
    """Decode and check the struct in ``variable``."""
    text = os.environ.get(variable)
    if text is None:
        raise BadSettings(f"{variable} is not set; start this process with launch.cluster")
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.DecodeError as error:
        raise BadSettings(f"{variable}: {error}") from error


def incarnation() -> Incarnation:
    """This process's incarnation number (ms); 0 when started by hand."""
    return Incarnation(int(os.environ.get(INCARNATION, "0")))
