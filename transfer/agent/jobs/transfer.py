"""A transfer: one rank's part of a job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from common.block import BlockLayout
from common.ids import NO_PLAN, JobId, PlanId
from transfer.agent.jobs.heads import OtherShards
from transfer.credits import CreditWord
from transfer.mooncake import BYTES_PER_BATCH, DESCRIPTORS_PER_BATCH
from transfer.pacing.pacer import Precedence
from transfer.ranges import Addresses

Ended = Callable[[Exception | None], None]
"""Told of an end: None if it is a good one, or the reason."""


class QueueFull(Exception):
    """More transfers than the queue holds: this one was not taken."""


class JobCancelled(Exception):
    """Nobody wants the job's bytes any more."""


class DeadlinePassed(Exception):
    """The job did not complete in time."""


@dataclass(frozen=True, eq=False)
class Group:
    """One rank's shards of objects of one layout, which are at addresses ``slots`` (shape (n,)),
    to or from the ``places`` (shape (n,)) of a pool whose buffers are at ``addresses``.

    ``layout``: of a shard; ``others``: objects to deliver whose shards are not those of the
    engine's ranks.
    """

    layout: BlockLayout
    addresses: Addresses
    slots: Addresses
    places: Addresses
    others: Sequence[OtherShards] = ()

    @cached_property
    def objects(self) -> int:
        return len(self.places) + sum(len(each.pages) for each in self.others)


def no_blocks(layout: BlockLayout, addresses: Addresses) -> Group:
    """Of a transfer that only has to end, or to say that it is done."""
    return Group(layout, addresses, np.empty(0, np.int64), np.empty(0, np.int64))


@dataclass(eq=False)
class Transfer:
    """One rank's shards of blocks, and of objects of parts: ``groups``, of which there is at
    least one. They go layer by layer of the model, of a pull some layers at a time.

    ``ended`` is called once, in the loop's thread, with None or the reason; none of the
    transfer's calls is running then. After :class:`TransferFailed` bytes may still land.
    """

    job: JobId
    session_id: str
    groups: Sequence[Group]
    deadline: float
    """On the monotonic clock."""
    ended: Ended
    is_read: bool = False
    """True for a pull."""
    urgent: bool = False
    plan: PlanId = NO_PLAN
    board_address: int = 0
    """0: no completion words."""
    credit: CreditWord | None = None
    """Of an engine with a layer window; None: every layer has a place of its own."""
    first_position: int = -1
    """Of layer 0 in that window."""
    stop_reason: Exception | None = None
    """Set: nothing more is transferred, and the transfer ends with this."""
    layers_done: int = 0
    scratch: int = -1
    """Its word in its queue's scratch memory."""
    precedence: Precedence = Precedence(False, 0, 0)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return self.groups[0].layout.num_layers

    @property
    def next_layers(self) -> range:
        """Those of its next turn: one of a delivery, whose engine waits for each. Nobody waits for
        a layer of what is read, of which as many go as Mooncake takes in one batch."""
        first, count = self.layers_done, 1
        if self.is_read:
            ranges = sum(each.objects * len(each.layout.component_bytes) for each in self.groups)
            nbytes = self._bytes_before(self.num_layers)
            fitting = BYTES_PER_BATCH * self.num_layers // max(1, nbytes)
            count = max(1, min(DESCRIPTORS_PER_BATCH // max(1, ranges), fitting))
        return range(first, min(first + count, self.num_layers))

    @property
    def nbytes(self) -> int:
        """Bytes transferred so far."""
        return self._bytes_before(self.layers_done)

    @property
    def left_nbytes(self) -> int:
        """Bytes not transferred yet."""
        return self._bytes_before(self.num_layers) - self.nbytes

    def _bytes_before(self, layer: int) -> int:
        nbytes = 0
        for group in self.groups:
            nbytes += group.layout.layer_start(layer) * group.objects
        return nbytes

    @property
    def has_room(self) -> bool:
        """Whether the engine's memory is free for the next layer."""
        return self.credit is None or self.credit.allows(self.first_position + self.layers_done)

    def check(self) -> None:
        """Raise if it should stop."""
        if self.stop_reason is not None:
            raise self.stop_reason
        if time.monotonic() > self.deadline:
            raise DeadlinePassed("deadline passed")
