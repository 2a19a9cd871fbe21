"""Snapshots of recurrent layers on their way to the node's agent.

SGLang takes one now and then, and does with its slot what it likes. Here it is copied into a
spare slot, which the agent reads; then the spare one is free for the next. So few are stored
that none is waited for: with no spare slot a snapshot is skipped, and counted.

Of one path the last turn's are wanted: a snapshot names the blocks before it whose own it replaces.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from common.block import BlockKey, tenant_digest
from common.ids import NO_INCARNATION
from common.messages.from_agents import PullEnded
from common.messages.from_engines import PartPlaces, PullBlocks
from common.samples import Sample, sample
from engine.config import EngineConfig
from engine.plans import Plans
from engine.ranks.group import Links
from engine.sglang.states.pool import StateCopies
from engine.sglang.views import Request
from engine.streams import Mark, Streams
from engine.transfers.jobs import Jobs
from engine.transfers.session_workers import SessionWorkers


class Snapshots:
    """One for an engine; offers come from the scheduler's thread."""

    def __init__(
        self,
        config: EngineConfig,
        plans: Plans,
        jobs: Jobs,
        links: Links,
        streams: Streams,
        copies: StateCopies,
    ) -> None:
        self._config = config
        self._plans = plans
        self._jobs = jobs
        self._links = links
        self._streams = streams
        self._copies = copies
        self._spares = list(copies.spares)
        self._open: set[int] = set()
        self.workers = SessionWorkers("dualpath-snapshots")
        self.offered_total = 0
        self.stored_total = 0
        self.skipped_total = 0

    def offer_prompt(
        self, request: Request, tokens: int, slot: torch.Tensor, is_branch: bool = False
    ) -> None:
        """Of the first ``tokens`` tokens of a prompt that this engine has computed; ``is_branch``:
        where it leaves another one. One without a plan may have begun under other weights."""
        plan = self._plans.get(request.rid)
        is_known = plan is not None and self._plans.accepts(plan)
        if not is_known or self._plans.is_made_up(request.rid) or self._config.experiment.zero_io:
            return
        key, fit = self._plans.key_at(request, tokens), self._plans.fit(request)
        found = fit.plan.keys if fit is not None and not is_branch else []
        older = found[: found.index(key)] if key in found else found
        self.offer(request, key, slot, older, is_branch)

    def offer(
        self,
        request: Request,
        key: BlockKey,
        slot: torch.Tensor,
        older: list[BlockKey],
        is_branch: bool = False,
    ) -> None:
        """``slot`` (shape (1,)) has the states at the end of block ``key``. It stands for those of
        the ``older`` blocks of its prefix: where others go on from it too, for none."""
        if not self._spares:
            self.skipped_total += 1
            return
        spare = self._spares.pop()
        with self._streams.behind_forwards():
            self._copies.copy(slot, spare)
        written = self._streams.after_forwards()
        agent, timeout_s = self._config.agent, self._config.pull_timeout_s

        def ended(reason: str) -> None:
            self._open.discard(job)
            self._spares.append(spare)

        incarnation = self._links.incarnation(agent) or NO_INCARNATION
        job = self._jobs.open(agent, incarnation, (), timeout_s, ended)
        self._open.add(job)
        self.offered_total += 1
        salt = request.cache_salt or request.extra_key
        message = PullBlocks(
            job,
            keys=[],
            pages=[],
            deadline_s=timeout_s,
            tenant=tenant_digest(salt) if salt else "",
            parts=[PartPlaces([key], [spare]) for _ in self._plans.weights.namespace.parts],
            replaces=older,
            is_branch=is_branch,
        )
        send = partial(self._send, message, written)
        if written.query():
            send()
        else:
            self.workers.submit("", send)

    def _send(self, message: PullBlocks, written: Mark) -> None:
        """Have it read; waits for the device, as a rule in a worker."""
        written.synchronize()
        agent = self._config.agent
        if self._jobs.has_stopped(message.job) or self._links.send(agent, message):
            return
        self._jobs.over(message.job, f"agent {agent} is not reachable")

    def pull_ended(self, message: PullEnded) -> None:
        """Count what the agent now holds (link thread)."""
        self.stored_total += message.job in self._open and all(message.held)

    def samples(self) -> Iterator[Sample]:
        """For the metrics."""
        for outcome, count in (
            ("offered", self.offered_total),
            ("stored", self.stored_total),
            ("skipped", self.skipped_total),
        ):
            yield sample("engine_snapshots_total", count, outcome=outcome)
