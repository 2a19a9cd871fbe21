"""Plans that the gateway has announced for requests about to arrive."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

import msgspec

from common.block import BlockKey
from common.ids import PlanId
from common.messages import EnginePlan

PLANS_MAX = 4096


class HeldPlan(msgspec.Struct, frozen=True):
    """The hit prefix of one request: block i of its prompt is ``keys[i]``, in the DRAM of
    ``agents[reader[i]]``. A hint: whoever uses it checks the keys."""

    id: PlanId
    rid: str
    namespace_digest: bytes
    keys: list[BlockKey]
    agents: list[str]
    reader: list[int]
    expires_at: float

    def reader_of(self, block: int) -> str:
        """The agent that delivers a block."""
        return self.agents[self.reader[block]]


class Plans:
    """By request id; bounded. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_rid: OrderedDict[str, HeldPlan] = OrderedDict()

    def put(self, message: EnginePlan) -> None:
        """Hold a plan; at the bound the oldest is forgotten (its request recomputes)."""
        held = HeldPlan(
            message.id,
            message.rid,
            message.namespace_digest,
            message.keys,
            message.agents,
            message.reader,
            time.monotonic() + message.deadline_s,
        )
        with self._lock:
            self._by_rid[message.rid] = held
            while len(self._by_rid) > PLANS_MAX:
                self._by_rid.popitem(last=False)

    def get(self, rid: str) -> HeldPlan | None:
        """The plan of a request, if there is one."""
        return self._by_rid.get(rid)

    def expired(self) -> list[HeldPlan]:
        """Plans whose deadline has passed: whoever sees them has them dropped."""
        now = time.monotonic()
        with self._lock:
            return [held for held in self._by_rid.values() if now > held.expires_at]

    def drop(self, rid: str) -> None:
        """The request is over."""
        with self._lock:
            self._by_rid.pop(rid, None)
