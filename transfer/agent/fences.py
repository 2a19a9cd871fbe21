"""The agent's part of a fence: proof that nothing of a failed transfer is under way from here.

After a failure Mooncake may go on with ranges of the batch that it has begun or queued, and the
kernel with what it was given of them. So a fence towards an engine is

1. a read from its memory that is asked for after the failure: Mooncake takes up what it has for
   one peer in turn, so by then it has begun all that it ever will (over RDMA the read needs a
   connection that was opened since the failure: what is left of the old one is dropped);
2. the end of this process's connections to it: what was begun has failed now, and nothing of it
   is left in a buffer of ours.

What this kernel still sends for a connection that a process had closed before, only the engine
can stop: it is told which ones are not so (:class:`common.messages.from_agents.Fenced`), and ends
the others (:mod:`engine.transfers.fence`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import psutil

from common.messages.from_agents import Fenced
from transfer.agent.engines import Engine, Rank
from transfer.connections import Connection, Endpoint, connections, cut
from transfer.mooncake import TransferFailed, TransferPeer

log = logging.getLogger(__name__)

AGAIN_S = 1.0
"""After an attempt that has failed."""


class Fences:
    """Lives in the agent's loop, to whose thread ``post`` hands a call over."""

    def __init__(self, peer: TransferPeer, post: Callable[[Callable[[], None]], None]) -> None:
        self._peer = peer
        self._post = post
        self._rising: set[Engine] = set()
        self._failed_s: WeakKeyDictionary[Engine, float] = WeakKeyDictionary()
        """When the latest attempt has failed, of engines without a fence since."""
        self.passed_total = 0

    def begin(self, engine: Engine, passed: Callable[[], None]) -> None:
        """Call ``passed`` once nothing is under way of what has failed before now. It is never
        called if there is no proof to be had now, or one is being had already: ask again."""
        failures = engine.failures
        if failures == engine.fenced_failures:
            passed()
        elif engine not in self._rising and self._is_due(engine):
            self._rising.add(engine)

            def ended(is_quiet: bool) -> None:
                self._rising.discard(engine)
                if is_quiet:
                    self.passed_total += 1
                    engine.fenced_failures = failures
                    self._failed_s.pop(engine, None)
                    passed()
                else:
                    self._failed_s[engine] = time.monotonic()

            threading.Thread(target=self._run, args=(engine, ended), daemon=True).start()

    def _is_due(self, engine: Engine) -> bool:
        failed_s = self._failed_s.get(engine)
        return failed_s is None or time.monotonic() - failed_s >= AGAIN_S

    def _run(self, engine: Engine, ended: Callable[[bool], None]) -> None:
        is_quiet = False
        try:
            is_quiet = all([self._is_quiet(engine, rank) for rank in engine.ranks])
        finally:
            with contextlib.suppress(RuntimeError):  # the agent ends
                self._post(lambda: ended(is_quiet))

    def _is_quiet(self, engine: Engine, rank: Rank) -> bool:
        session_id, address = rank.session_id, rank.some_address
        try:
            self._peer.meet(session_id, address)
        except TransferFailed as error:
            # Of a process that is gone nothing can be read; but what was queued before has failed.
            if not engine.is_gone:
                if engine not in self._failed_s:  # else it has been said
                    log.warning("no fence yet engine=%s: %s", engine.name, error)
                return False
        cut([inode for _, inode in _towards([rank])])
        if not engine.is_gone:
            self._peer.freshen(session_id, address)
            self._peer.forgive(session_id)
        return True


def fenced(engine: Engine, number: int) -> Fenced:
    """What the engine is told of a fence that it has asked for, once it has passed."""
    of_nics = psutil.net_if_addrs().values()
    hosts = [each.address.partition("%")[0] for of_nic in of_nics for each in of_nic]
    live = [(end.here.host, end.here.port) for end, inode in _towards(engine.ranks) if inode]
    return Fenced(number, hosts, live)


def _towards(ranks: Iterable[Rank]) -> list[tuple[Connection, int]]:
    far = {Endpoint(rank.host.strip("[]"), rank.data_port) for rank in ranks if rank.data_port}
    found = connections({end.port for end in far})
    return [(connection, inode) for connection, inode in found if connection.there in far]
