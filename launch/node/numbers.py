"""Numbers of the starts of a node's processes: the gateway's, which no host's clock is in."""

from __future__ import annotations

import asyncio
import time

from common.ids import Incarnation
from launch.cluster.process_record import ProcessRecord
from launch.cluster.supervisor import Numbers, Start
from launch.node.lease import Lease

LOOK_S = 0.5


class GrantedNumbers(Numbers):
    """The first start of each process has what joining granted. Another one of an engine is asked
    for; where nobody answers, and for agents, time on this host since the grant is added, so that
    it is greater than all before and not greater than what the gateway grants next."""

    def __init__(self, lease: Lease, granted: Start, is_of_several_hosts: bool = False) -> None:
        super().__init__()
        self._is_of_several_hosts = is_of_several_hosts
        """Then what its lease says is what its engine's ranks run as, on all hosts the same."""
        self._lease = lease
        self._granted = granted
        self._granted_s = time.monotonic()
        self._starts: dict[str, Start] = {}

    async def next_start(self, record: ProcessRecord, restarts: int) -> Start:
        last = self._starts.get(record.name)
        start = self._granted if last is None else await self._again(record, last)
        self._starts[record.name] = start
        if record.kind == "engine" or not self._is_of_several_hosts:
            self._lease.started(start.incarnation, start.turn)
        return start

    def may_end_for_others(self, record: ProcessRecord) -> bool:
        return bool(record.together)

    async def overtaken(self, record: ProcessRecord, start: Start) -> str:
        """Of an engine over several hosts: another host's ranks have ended."""
        while not record.together or self._lease.wanted <= start.incarnation:
            await asyncio.sleep(LOOK_S)
        return "begins anew with the other hosts of its engine"

    async def _again(self, record: ProcessRecord, last: Start) -> Start:
        if record.kind == "engine":
            answer = await self._lease.restart(last.incarnation)
            while answer is None and record.together:  # a number of its own would be no other's
                await asyncio.sleep(LOOK_S)
                answer = await self._lease.restart(last.incarnation)
            if answer is not None and answer.incarnation > last.incarnation:
                self._granted = Start(answer.incarnation, answer.turn)
                self._granted_s = time.monotonic()
                return self._granted
        elapsed_ms = int((time.monotonic() - self._granted_s) * 1000)
        number = max(last.incarnation, self._granted.incarnation + elapsed_ms) + 1
        return Start(Incarnation(number), last.turn + 1)
