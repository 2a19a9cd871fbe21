"""How a process gets its settings: one typed struct, as JSON in one environment variable.

The launcher writes it into the process record; the process reads it at start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import ClassVar, Self

import msgspec

from common.ids import Incarnation

INCARNATION = "DUALPATH_INCARNATION"
"""Start time of the process in ms, set by the supervisor at every (re)start."""

RUN_FOLDER = "DUALPATH_RUN_FOLDER"
"""A folder that lasts as long as the cluster, set by the supervisor."""


class BadSettings(Exception):
    """The variable is missing or does not hold the struct."""


class ProcessSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one kind of process."""

    VARIABLE: ClassVar[str]
    """Of the environment, that holds them."""

    def to_env(self) -> dict[str, str]:
        """The variable, with the JSON that :meth:`from_env` reads back."""
        return {self.VARIABLE: msgspec.json.encode(self).decode()}

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Decoded and checked; raises :class:`BadSettings`."""
        text = environ.get(cls.VARIABLE)
        if text is None:
            raise BadSettings(f"{cls.VARIABLE} is not set; start this process with launch.cluster")
        try:
            return msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            raise BadSettings(f"{cls.VARIABLE}: {error}") from error


def incarnation() -> Incarnation:
    """This process's incarnation number (ms); 0 when started by hand."""
    return Incarnation(int(os.environ.get(INCARNATION, "0")))
