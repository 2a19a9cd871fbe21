"""What is known of the hosts on which something runs."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


@dataclass(frozen=True)
class Where:
    """A host that a group was given."""

    node: str
    """As Ray calls it."""
    address: str


class Look(msgspec.Struct, frozen=True):
    """What an actor says of its child."""

    said: str = ""
    exit_code: int | None = None
    waits: bool = False
    """It is not started: another of its name drains there."""
    unfit: str = ""
    """What is wrong with how Ray was started on its host."""
    lost: str = ""
    """Why there is no actor any more."""
