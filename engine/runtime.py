"""What the plugin keeps in one engine process (SGLang's scheduler process), in one place.

Built when SGLang has set up its P/D side, so that the KV pool and Mooncake's engine exist.
The hooks find it through :func:`runtime`.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from common.block import Namespace
from common.ids import BoardSlot, JobId
from common.loads import EngineLoad
from common.messages import (
    AgentHello,
    EndPlan,
    EngineHello,
    EnginePlan,
    JobEnded,
    Message,
    PullEnded,
    RankMemory,
    RegisterEngine,
    UnknownEngine,
)
from common.process_settings import incarnation
from common.samples import Sample, reported, sample
from engine.config import EngineConfig
from engine.control import ControlServer
from engine.decode.persist import Persister
from engine.decode.restore import Restores
from engine.model_digest import model_digest
from engine.plans import Plans
from engine.prefill.forwards import PrefillForwards
from engine.prefill.hit_loads import HitLoads
from engine.prefill.layer_window import LayerWindow
from engine.prefill.timing import PrefillTiming
from engine.ranks.group import CreditsAt, Event, JobOver, Links, RankGroup, SilentLinks
from engine.sglang.kv_pool import memory_of
from engine.transfers.completion_board import CompletionBoard, OtherBoards
from engine.transfers.deliveries import Deliveries
from engine.transfers.jobs import Jobs
from engine.transfers.page_holds import PageHolds
from engine.weights import Weights
from transfer.client import AgentLinks

log = logging.getLogger(__name__)

BOARD_WORDS = 4096
_REAP_S = 0.25
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


def start_runtime(config: EngineConfig, scheduler: Any) -> EngineRuntime:
    """Build the runtime on a scheduler whose P/D side is set up."""
    global _runtime
    _runtime = EngineRuntime(config, scheduler)
    _runtime.prefill_timing.start_quota(
        _runtime.weights.namespace.model_digest, _runtime.memory.layout.page_tokens
    )
    return _runtime


class EngineRuntime:
    """Owns the board, the holds, the links to agents and the control port."""

    def __init__(self, config: EngineConfig, scheduler: Any) -> None:
        from sglang.srt.arg_groups.model_override_base import resolved_view
        from sglang.srt.distributed.parallel_state import get_mooncake_transfer_engine
        from sglang.srt.runtime_context import get_parallel

        # As given, --dp-size may still be an older name for --attn-dp-size.
        args = resolved_view(scheduler.server_args)
        if max(args.pp_size, args.dp_size, args.attn_cp_size) > 1:
            raise NotImplementedError("DualPath knows --tp and --attn-dp-size: take others out")
        attention_group = get_parallel().attn_dp_rank
        self.config = config
        self.name = config.name
        if args.attn_dp_size > 1:
            self.name = f"{config.name}.{attention_group}"
        self.scheduler = scheduler
        self.incarnation = incarnation()
        allocator = scheduler.token_to_kv_pool_allocator
        kv_heads = scheduler.model_config.get_total_num_kv_heads()
        self.memory = memory_of(allocator.get_kvcache(), kv_heads)
        group = scheduler.attn_tp_group
        self.ranks = RankGroup(group.rank_in_group, group.world_size, group.cpu_group, self._apply)
        self.weights = Weights(self._first_namespace(), f"{self.name}-{self.incarnation}")
        self.plans = Plans(self.weights, self.memory.layout.page_tokens)
        self.credits_at: dict[str, CreditsAt] = {}
        """By agent; of an engine with a layer window."""
        self.prefill_timing = PrefillTiming(
            scheduler, config.prefill_quota_s, lambda: self.deliveries.waits()
        )
        self.holds = PageHolds(allocator)
        self.jobs = Jobs(self.incarnation, self.holds, tell=self._tell_job_over)
        transfer_engine = get_mooncake_transfer_engine()
        board = CompletionBoard(BOARD_WORDS, transfer_engine.register)
        self._rank_memories = self.ranks.gather(
            RankMemory(
                transfer_engine.get_session_id(), self.memory.addresses, board.address(BoardSlot(0))
            )
        )
        others = OtherBoards(
            [(m.session_id, m.board_address) for m in self._rank_memories[1:]],
            transfer_engine.register,
            transfer_engine.transfer_sync,
        )
        self.links = self._open_links()
        self.weights.on_change = lambda: self.links.set_hello(self._registration())
        self.deliveries = Deliveries(
            config, board, self.jobs, self.links, self.memory.layout.num_layers, others.fail
        )
        self.persister = Persister(
            config, scheduler.req_to_token_pool.req_to_token, self.jobs, self.links, self.plans
        )
        self.prefill_forwards = self._open_prefill_forwards()
        self.hit_loads = HitLoads(config, self.plans, self.deliveries, self.layer_window)
        """Used by a prefill engine."""
        self.restores = Restores(config, self.plans, self.deliveries, self.persister, self.links)
        """Used by a decode engine."""
        if self.ranks.is_leader:
            self._listen(config.controls[attention_group])
        self._say_up()

    def _listen(self, endpoint: str) -> None:
        ControlServer(endpoint, self.ranks.post, self.hello, self.plans.accepts)
        threading.Thread(target=self._watch, name="dualpath-watch", daemon=True).start()

    def _open_links(self) -> Links:
        if not self.ranks.is_leader:
            return SilentLinks()
        return AgentLinks(
            self.config.agents,
            self._registration(),
            self._on_message,
            self.jobs.agent_restarted,
            self._on_hello,
        )

    def _open_prefill_forwards(self) -> PrefillForwards | None:
        if self.config.role != "prefill":
            return None
        return PrefillForwards(
            self.config,
            self.scheduler,
            self.memory,
            self.deliveries,
            self.ranks.rank,
            self.credits_at,
        )

    def _say_up(self) -> None:
        log.info(
            "dualpath engine up name=%s role=%s rank=%d of=%d shards=%d namespace=%s",
            self.name,
            self.config.role,
            self.ranks.rank,
            self.ranks.size,
            self.memory.layout.shards,
            self.weights.digest.hex()[:16],
        )

    @property
    def layer_window(self) -> LayerWindow | None:
        """Of a prefill engine that holds KV of some layers only."""
        return self.prefill_forwards.window if self.prefill_forwards is not None else None

    # ---- keys ----

    def _first_namespace(self) -> Namespace:
        args = self.scheduler.server_args
        digest = model_digest(Path(args.model_path)) if self.ranks.is_leader else ""
        return Namespace(
            self.ranks.gather(digest)[0],
            str(getattr(args, "weight_version", None) or ""),
            self.memory.kv_dtype,
            msgspec.structs.replace(self.memory.layout, shards=1),
        )

    # ---- messages ----

    def _registration(self) -> RegisterEngine:
        return RegisterEngine(
            self.name,
            self.incarnation,
            self.weights.namespace,
            self.memory.layout.shards,
            self._rank_memories,
        )

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

    def _on_hello(self, hello: AgentHello) -> None:
        if self.config.layer_window and hello.credit_address:
            self.ranks.post(CreditsAt(hello.agent, hello.session_id, hello.credit_address))

    def _on_message(self, agent: str, message: Message) -> None:
        match message:
            case JobEnded():
                if self.jobs.of_incarnation(message.job, agent, message.incarnation):
                    self.jobs.over(message.job, message.error)
            case PullEnded():
                if self.jobs.of_incarnation(message.job, agent, message.incarnation):
                    self.persister.pull_ended(message)
                    self.jobs.over(message.job)
            case UnknownEngine():
                # A restarted agent got a job meant for its predecessor: it started nothing.
                self.jobs.over(message.job, f"agent {agent} restarted")

    def hello(self) -> EngineHello:
        """State for the gateway: read from the scheduler without locks, so approximate."""
        scheduler = self.scheduler
        waiting = list(scheduler.waiting_queue)
        for queue in (
            scheduler.disagg_prefill_bootstrap_queue,
            scheduler.disagg_decode_prealloc_queue,
            scheduler.disagg_decode_transfer_queue,
        ):
            waiting += [getattr(entry, "req", entry) for entry in queue.queue] if queue else []
        running = list(scheduler.running_batch.reqs)
        chunked = [scheduler.chunked_req] if scheduler.chunked_req is not None else []
        is_prefill = self.config.role == "prefill"
        load = EngineLoad(
            engine=self.name,
            role=self.config.role,
            agent=self.config.agent,
            incarnation=self.incarnation,
            group=self.config.name,
            sequences=len(running) + len(waiting),
            pending_tokens=sum(map(self._pending_tokens, waiting + chunked)) if is_prefill else 0,
            context_tokens=sum(
                len(req.origin_input_ids) + len(req.output_ids) for req in running + waiting
            ),
            free_tokens=self.holds.free_tokens + scheduler.tree_cache.evictable_size(),
            prefill_cost=self.prefill_timing.forward.cost(),
        )
        return EngineHello(
            load=load,
            namespace=self.weights.namespace,
            bootstrap_port=self._bootstrap_port(),
            samples=reported(self._samples()),
        )

    def _pending_tokens(self, req: Any) -> int:
        """Prompt tokens of a request that are neither computed nor to be loaded."""
        plan = self.plans.get(req.rid)
        loaded = len(plan.keys) * self.memory.layout.page_tokens if plan is not None else 0
        return max(0, len(req.origin_input_ids) - max(loaded, req.prefix_len))

    def _bootstrap_port(self) -> int:
        if self.config.role != "prefill":
            return 0
        return int(self.scheduler.server_args.disaggregation_bootstrap_port)

    def _samples(self) -> Iterator[Sample]:
        if self.prefill_forwards is not None:
            yield from self.prefill_forwards.samples()
            yield from self.prefill_timing.samples()
        quarantined = self.holds.pages_of(self.jobs.overdue())
        yield sample("engine_deliveries_total", self.deliveries.started_total)
        yield sample("engine_deliveries_failed_total", self.deliveries.failed_total)
        yield sample("engine_open_jobs", len(self.jobs))
        yield sample("engine_quarantined_pages", quarantined)
        yield sample("engine_blocks_offered_total", self.persister.offered_blocks_total)
        yield sample("engine_blocks_stored_total", self.persister.stored_blocks_total)
        yield sample("engine_offers_deferred_total", self.persister.deferred_offers_total)

    # ---- quarantine ----

    def _watch(self) -> None:
        pause = threading.Event()
        while not pause.wait(_REAP_S):
            self.jobs.reap()
            for plan in self.plans.expired():
                self.ranks.post(EndPlan(plan.id, plan.rid))
            self._end_if_quarantine_is_full()

    def _end_if_quarantine_is_full(self) -> None:
        pool = self.scheduler.token_to_kv_pool_allocator.num_pages
        quarantined = self.holds.pages_of(self.jobs.overdue())
        if quarantined <= pool * self.config.quarantine_fraction_max:
            return
        log.critical("%d of %d pages in quarantine: ending to be restarted", quarantined, pool)
        # SGLang's own convention: the HTTP process ends everything on SIGQUIT.
        os.kill(os.getppid(), signal.SIGQUIT)
        os._exit(1)
