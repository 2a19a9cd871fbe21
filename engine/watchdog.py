"""What has to end without a message: jobs that have failed, plans past their deadline, and the
engine itself when too many of its pages are in quarantine for longer than fences take."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable

from common.messages.from_gateway import EndPlan
from engine.plans import Plans
from engine.transfers.fence import Fences
from engine.transfers.jobs import Jobs

log = logging.getLogger(__name__)

FENCED_WITHIN_S = 10.0
"""A fence takes a second or two where both hosts live; until then the pool is but short."""
_LOOK_EVERY_S = 0.25


class Watchdog:
    """A thread of the leader's. ``post`` lets an event take effect at every rank."""

    def __init__(
        self,
        jobs: Jobs,
        fences: Fences,
        plans: Plans,
        post: Callable[[EndPlan], None],
        quarantined_pages_max: float,
    ) -> None:
        self._jobs = jobs
        self._fences = fences
        self._plans = plans
        self._post = post
        self._quarantined_pages_max = quarantined_pages_max
        self._seen_below_s = time.monotonic()
        """When there were last no more pages in quarantine than that."""

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._run, name="dualpath-watch", daemon=True).start()

    def look(self) -> None:
        """Once."""
        self._fences.look()
        for plan in self._plans.expired():
            self._post(EndPlan(plan.id, plan.rid))
        quarantined = self._jobs.quarantined_pages()
        if quarantined <= self._quarantined_pages_max:
            self._seen_below_s = time.monotonic()
        elif time.monotonic() - self._seen_below_s >= FENCED_WITHIN_S:
            log.critical("%d pages in quarantine: ending to be restarted", quarantined)
            end_engine()

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(_LOOK_EVERY_S):
            try:
                self.look()
            except Exception:  # no descriptor for /proc, say: without this thread nothing ends
                log.exception("watchdog: goes on")


def end_engine() -> None:
    """SGLang's own convention: the HTTP process ends everything on SIGQUIT."""
    os.kill(os.getppid(), signal.SIGQUIT)
    os._exit(1)
