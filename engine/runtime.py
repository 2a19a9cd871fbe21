"""One engine's parts, and how what it hears reaches them.

Built in SGLang's scheduler process, when SGLang has set up its P/D side, so that the KV pool
and Mooncake's engine exist (:mod:`engine.sglang.startup`). The hooks find it through
:func:`runtime`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from common.block import Namespace
from common.ids import BoardSlot, Incarnation, JobId
from common.messages.codec import Message
from common.messages.fields import REQUESTS_MAX
from common.messages.from_agents import (
    AgentHello,
    Fenced,
    JobEnded,
    KeptWitness,
    PullEnded,
    UnknownEngine,
)
from common.messages.from_engines import EngineEnds, RankMemory, RegisterEngine
from common.messages.from_gateway import EndPlan, EnginePlan, KnownAgents
from common.samples import Sample
from engine.config import EngineConfig
from engine.control import LAST_WORDS_S, ControlServer
from engine.decode.persist import Persister
from engine.decode.restore import Restores
from engine.host import Host
from engine.model_digest import model_digest
from engine.page_table import PageTable
from engine.plans import Plans
from engine.prefill.forwards import Credits, PrefillForwards
from engine.prefill.hit_loads import HitLoads
from engine.prefill.timing import PrefillTiming
from engine.ranks.group import (
    AgentLeft,
    CreditsAt,
    CutConnections,
    Event,
    FindConnections,
    HostsKnown,
    JobOver,
    Links,
    RankGroup,
    SilentLinks,
)
from engine.report import EngineReport, with_links
from engine.sglang.requests import EngineRequests
from engine.transfers.completion_board import CompletionBoard, OtherBoards
from engine.transfers.deliveries import Deliveries
from engine.transfers.fence import Fences, RankConnections
from engine.transfers.jobs import Jobs
from engine.transfers.page_holds import PageHolds
from engine.transfers.snapshots import Snapshots
from engine.watchdog import Watchdog
from engine.weights import CommitWeights, FolderDigested, VariantTaken, Weights
from engine.witness import Values, WitnessCheck, merged
from transfer.client import AgentLinks
from transfer.control.keys import Keys
from transfer.credits import credit_tag
from transfer.ports.member_hosts import MemberHosts

log = logging.getLogger(__name__)

BOARD_WORDS = 4096
REASON_CHARS = 200
FLUSH_S = 0.1
"""What was sent leaves the process meanwhile."""
_runtime: EngineRuntime | None = None


class NotStarted(Exception):
    """A hook ran before SGLang had set up its P/D side."""


def runtime() -> EngineRuntime:
    """The process's runtime."""
    if _runtime is None:
        raise NotStarted("the engine runtime is not up yet")
    return _runtime


def runtime_if_up() -> EngineRuntime | None:
    """The same for hooks that SGLang also calls while it starts."""
    return _runtime


def set_runtime(engine: EngineRuntime) -> None:
    """From now on the hooks find it."""
    global _runtime
    _runtime = engine


class EngineRuntime:
    """Built once a process."""

    def __init__(self, config: EngineConfig, host: Host) -> None:
        self.config = config
        self._host = host
        self._keys = Keys(host.identity.name, config.control_secret)
        self.memory = host.memory
        self.streams = host.streams
        group = host.scheduler.attn_tp_group
        self.ranks = RankGroup(group.rank_in_group, group.world_size, group.cpu_group, self._apply)
        # Job numbers are made of its incarnation, and ranks on other hosts have another launcher.
        self._me = self.ranks.of_leader(host.identity)
        self.weights = Weights(
            self._first_namespace(), unnamed=f"{self._me.name}-{self._me.incarnation}"
        )
        self.plans = Plans(self.weights, self.memory.layout.page_tokens)
        kv_pages, *of_parts = host.allocators
        holds = {id(places): PageHolds(places) for places in of_parts}
        self.holds = PageHolds(kv_pages, [holds[id(places)] for places in of_parts])
        self.jobs = Jobs(self._me.incarnation, self.holds, tell=self._tell_job_over)
        register = host.transfer_engine.register
        board = CompletionBoard(BOARD_WORDS, register)
        own = RankMemory(
            host.transfer_engine.get_session_id(),
            self.memory.addresses,
            board.address(BoardSlot(0)),
            host.data_port,
            [part.addresses for part in self.memory.parts],
        )
        self._rank_memories = self.ranks.gather(own)
        others = OtherBoards(
            [(m.session_id, m.board_address) for m in self._rank_memories[1:]],
            register,
            host.transfer_engine.transfer_sync,
        )
        self._witness: WitnessCheck | None = None
        self._hosts = MemberHosts(config.heard)
        self.credits_at: dict[str, CreditsAt] = {}
        """By agent; of an engine with a layer window."""
        self.links = self._open_links()
        self.jobs.host_of = self.links.host
        self.fences = Fences(self.jobs, self.links, self.ranks.post)
        self._connections = RankConnections(host.data_port)
        self.weights.on_change = lambda: self.links.set_hello(self._registration())
        self.deliveries = Deliveries(
            config, board, self.jobs, self.links, self.memory.layout.num_layers, others.fail
        )
        self._control: ControlServer | None = None
        self.snapshots: Snapshots | None = None
        if host.states is not None:
            self.snapshots = Snapshots(
                config, self.plans, self.jobs, self.links, self.streams, host.states
            )
        self._open_prefill()
        self._open_decode()
        if host.control:
            self._listen()
        self._say_up()

    def _first_namespace(self) -> Namespace:
        digest = model_digest(Path(self._host.model_path)) if self.ranks.is_leader else ""
        return Namespace(
            self.ranks.gather(digest)[0],
            self._host.weight_version,
            self.memory.kv_dtype,
            msgspec.structs.replace(self.memory.layout, shards=1),
            self._host.settings,
            parts=tuple(part.part for part in self.memory.parts),
        )

    def _open_links(self) -> Links:
        if not self.ranks.is_leader:
            return SilentLinks()
        links = AgentLinks(
            self.config.agents,
            self._keys,
            self._registration(),
            self._on_message,
            self._on_incarnation,
            self._on_hello,
        )
        links.on_left = lambda agent: self.ranks.post(AgentLeft(agent))
        return links

    def _open_prefill(self) -> None:
        """Parts that only a prefill engine uses."""
        config, scheduler = self.config, self._host.scheduler
        self.prefill_timing = PrefillTiming(
            scheduler, config.prefill_quota_s, self.deliveries.waits, self.streams.device
        )
        self.deliveries.pause = self.prefill_timing.clock.pause
        self.prefill_forwards: PrefillForwards | None = None
        if self._me.role == "prefill":
            self.prefill_forwards = PrefillForwards(
                config,
                scheduler,
                self.memory,
                self.deliveries,
                self.streams,
                Credits(self.ranks.rank, self.credits_at),
            )
        window = self.prefill_forwards.window if self.prefill_forwards is not None else None
        self.hit_loads = HitLoads(config, self.plans, self.deliveries, window)

    def _open_decode(self) -> None:
        """Parts that only a decode engine uses."""
        rows = self._host.scheduler.req_to_token_pool.req_to_token
        page_tokens = self.memory.layout.page_tokens
        table = PageTable(rows, page_tokens, self.streams, self._host.window)
        stores = not self.memory.unstored
        self.persister = Persister(self.config, table, self.jobs, self.links, self.plans, stores)
        self.restores = Restores(
            self.config, self.plans, self.deliveries, self.persister, self.links, table
        )

    def _listen(self) -> None:
        """To the gateway, and for what comes without a message; on a further host to its launcher
        alone, for whom SGLang's own process there answers whatever its ranks do."""
        samples = [self.deliveries.samples, self.jobs.samples, self.fences.samples]
        samples += [self.persister.samples, self.restores.samples, self._witness_samples]
        if self.prefill_forwards is not None:
            samples += [self.prefill_forwards.samples, self.prefill_timing.samples]
        if self.snapshots is not None:
            samples.append(self.snapshots.samples)
        report = EngineReport(
            self._me,
            EngineRequests(self._host.scheduler),
            self.plans,
            self.holds,
            self.prefill_timing.forward.cost,
            samples,
        )
        if not self.ranks.is_leader:
            ControlServer(
                self._host.control,
                on_plan=lambda plan: None,
                hello=report.hello,
                accepts=lambda plan: False,
                keys=self._keys,
            )
            return
        links = self.links
        assert isinstance(links, AgentLinks)  # of a leader

        def meet(known: KnownAgents) -> None:
            self.ranks.post(HostsKnown(known.hosts, known.complete))
            links.meet(known)

        self._control = ControlServer(
            self._host.control,
            self.ranks.post,
            lambda: with_links(report.hello(), links),
            self.plans.accepts,
            self._keys,
            meet,
        )
        quarantined_max = self._host.allocators[0].num_pages * self.config.quarantine_fraction_max
        Watchdog(self.jobs, self.fences, self.plans, self.ranks.post, quarantined_max).start()

    def _say_up(self) -> None:
        log.info(
            "dualpath engine up name=%s role=%s rank=%d of=%d shards=%d namespace=%s settings=%s",
            self._me.name,
            self._me.role,
            self.ranks.rank,
            self.ranks.size,
            self.memory.layout.shards,
            self.weights.digest.hex()[:16],
            self.weights.namespace.settings,
        )

    def compare_witness(self, own: Values) -> None:
        """With what agents keep; all ranks at once, each with its own samples. The variants that
        this leads to are taken with the first broadcast among ranks, before any request."""
        of_ranks = self.ranks.gather(own)
        if not self.ranks.is_leader:
            return
        witness = self._witness = WitnessCheck(
            self.weights.namespace,
            merged(of_ranks),
            self._me.incarnation or time.time_ns() // 10**6,  # 0: started by hand
            ask=self.links.send,
            take=lambda variant: self.ranks.post(VariantTaken(variant)),
        )
        for agent in self.config.agents:  # of the others we hear from now on
            if self.links.incarnation(agent) is not None:
                witness.greeted(agent)
        witness.settle(self.config.agents)

    def _witness_samples(self) -> Iterator[Sample]:
        if self._witness is not None:
            yield from self._witness.samples()

    # ---- what the leader says ----

    def say_last(self, rids: list[str], reason: str) -> None:
        """This rank is about to end the engine, being at work on these requests."""
        if self._control is None:
            time.sleep(2 * LAST_WORDS_S)  # the leader is to speak before it is ended as well
            return
        log.error("dualpath engine ends at_work=%s reason=%s", rids, reason)
        words = EngineEnds(self._me.incarnation, rids[:REQUESTS_MAX], reason[:REASON_CHARS])
        self._control.say_last(words)
        time.sleep(FLUSH_S)

    def _registration(self) -> RegisterEngine:
        pages, *of_parts = (each.num_pages + 1 for each in self._host.allocators)  # 0 is a dummy
        return RegisterEngine(
            self._me.name,
            self._me.incarnation,
            self.weights.namespace,
            self.memory.layout.shards,
            self._rank_memories,
            pages,
            BOARD_WORDS,
            of_parts,
        )

    # ---- what it hears ----

    def _on_hello(self, hello: AgentHello) -> None:
        if self.config.layer_window and hello.credit_address:
            tag = credit_tag(self._me.incarnation)
            at = CreditsAt(hello.agent, hello.session_id, hello.credit_address, tag)
            self.ranks.post(at)

    def _on_incarnation(self, agent: str, incarnation: Incarnation) -> None:
        self.jobs.agent_restarted(agent, incarnation)
        if self._witness is not None:
            self._witness.greeted(agent)

    def _on_message(self, agent: str, message: Message) -> None:
        match message:
            case KeptWitness():
                if self._witness is not None:
                    self._witness.answered(agent, message)
            case JobEnded():
                if self.jobs.of_incarnation(message.job, agent, message.incarnation):
                    end = self.jobs.stopped_writing if message.may_land else self.jobs.over
                    end(message.job, message.error)
            case Fenced():
                self.fences.answered(agent, message)
            case PullEnded():
                if self.jobs.of_incarnation(message.job, agent, message.incarnation):
                    self.persister.pull_ended(message)
                    if self.snapshots is not None:
                        self.snapshots.pull_ended(message)
                    self.jobs.over(message.job)
            case UnknownEngine():
                # A restarted agent got a job meant for its predecessor: it started nothing.
                self.jobs.over(message.job, f"agent {agent} restarted")

    def _tell_job_over(self, job: JobId, reason: str) -> None:
        self.ranks.post(JobOver(job, reason))

    def _apply(self, event: Event) -> None:
        """At every rank; the jobs and plans of all stay alike."""
        match event:
            case EnginePlan():
                self.plans.put(event)
            case EndPlan():
                self.plans.drop(event.rid)
            case JobOver():
                self.jobs.close(event.job, event.reason)
            case CreditsAt():
                self.credits_at[event.agent] = event
            case AgentLeft():
                self.credits_at.pop(event.agent, None)
            case HostsKnown():
                self._hosts.meet(event.hosts, event.are_all)
            case CommitWeights() | FolderDigested() | VariantTaken():
                self.weights.heard(event)
            case FindConnections():
                found = self.ranks.gather(self._connections.find(event.hosts, event.live))
                if self.ranks.is_leader:
                    self.fences.found(event, found)
            case CutConnections():
                late = event.late[self.ranks.rank]
                are_left = self.ranks.gather(self._connections.cut(late))
                if self.ranks.is_leader:
                    self.fences.were_cut(event, are_left)
