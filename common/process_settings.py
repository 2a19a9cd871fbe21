"""How a process gets its settings: one typed struct, as JSON in one environment variable, but for
its secrets, which are in a private file.

The launcher writes both into the process record; the process reads them at start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import msgspec

from common.ids import Incarnation

INCARNATION = "DUALPATH_INCARNATION"
"""Start time of the process in ms, set by the supervisor at every (re)start."""

RUN_FOLDER = "DUALPATH_RUN_FOLDER"
"""A folder that lasts as long as the cluster, set by the supervisor."""

SHARED_MEMORY = "shared-memory"
"""How names of files there begin that list what of ``/dev/shm`` goes with it: a name a line."""

SECRETS = "DUALPATH_SECRETS"
"""A private file with the settings of the process that are secret, set by the supervisor: whoever
runs as the same user reads the environment of a process in ``/proc``, and what it logs."""


class BadSettings(Exception):
    """The variable is missing or does not hold the struct."""


class ProcessSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of one kind of process."""

    VARIABLE: ClassVar[str]
    """Of the environment, that holds them."""
    SECRET: ClassVar[tuple[str, ...]] = ()
    """Fields that it does not hold. They have defaults."""

    def to_env(self) -> dict[str, str]:
        """The variable, with the JSON that :meth:`from_env` reads back."""
        fields = msgspec.to_builtins(self)
        public = {name: value for name, value in fields.items() if name not in self.SECRET}
        return {self.VARIABLE: msgspec.json.encode(public).decode()}

    def secrets(self) -> bytes:
        """Content of the private file; empty where nothing is secret."""
        fields = {name: getattr(self, name) for name in self.SECRET}
        return msgspec.json.encode(fields) if any(fields.values()) else b""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Decoded and checked; raises :class:`BadSettings`."""
        text = environ.get(cls.VARIABLE)
        if text is None:
            raise BadSettings(f"{cls.VARIABLE} is not set; start this process with launch.cluster")
        try:
            fields = _raw(text.encode())
            if path := environ.get(SECRETS):
                fields |= _raw(Path(path).read_bytes())
            return msgspec.json.decode(msgspec.json.encode(fields), type=cls)
        except (msgspec.DecodeError, OSError) as error:
            raise BadSettings(f"{cls.VARIABLE}: {error}") from error


def _raw(fields: bytes) -> dict[str, msgspec.Raw]:
    return msgspec.json.decode(fields, type=dict[str, msgspec.Raw])


def incarnation() -> Incarnation:
    """This process's incarnation number (ms); 0 when started by hand."""
    return Incarnation(int(os.environ.get(INCARNATION, "0")))


def shared_memory_of(session: int, run_folder: str) -> Path:
    """The list of what this session of processes makes in ``/dev/shm``, noted before it is made."""
    return Path(run_folder) / f"{SHARED_MEMORY}-{session}"
