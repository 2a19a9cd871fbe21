"""The agent: which part of it gets which message, and what it tells unasked.

Owns the node's registered host memory and its storage tiers. Reads blocks for the
gateway's plans, delivers them into engines' KV memory, pulls new ones out of it, and
announces what it holds. One asyncio loop decides everything; storage and transfers run in
threads and report back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator

from common.ids import PlanId
from common.loads import AgentLoad
from common.messages.codec import MalformedMessage, Message
from common.messages.fields import Ping, Superseded
from common.messages.from_agents import AgentHello, AgentStatus, KeptWitness
from common.messages.from_engines import (
    AskFence,
    CancelJob,
    Deliver,
    KeepWitness,
    PullBlocks,
    RegisterEngine,
)
from common.messages.from_gateway import (
    ForgetWeights,
    KnownEngines,
    ReadShare,
    ReleasePlan,
    Subscribe,
)
from common.samples import Sample, reported, sample
from storage.store_events import StoreStats
from transfer.agent.config import AgentConfig
from transfer.agent.engines import BadRegistration, check_registration
from transfer.agent.metrics import store_samples
from transfer.agent.resources import Resources
from transfer.agent.serving import Serving, Unserved
from transfer.control.senders import decode_from
from transfer.pacing.agent_pacing import pacer_samples

log = logging.getLogger(__name__)

TICK_S = 0.2


class Agent:
    """Built and used inside a running loop; start errors are those of its parts."""

    def __init__(self, config: AgentConfig) -> None:
        self._loop = asyncio.get_running_loop()
        self._poll_due = False
        self._resources = resources = Resources(config, self._wake)
        self._state: Unserved | Serving = Unserved(resources)
        log.info(
            "agent up name=%s incarnation=%d session=%s control=%s dram_bytes=%d page_bytes=%d",
            config.name,
            resources.incarnation,
            resources.peer.session_id,
            config.control,
            resources.memory.size_bytes,
            resources.memory.page_bytes,
        )

    # ---- the loop -----------------------------------------------------------------------

    async def serve(self) -> None:
        """Until cancelled: one message after the other, whatever it is."""
        ticker = asyncio.create_task(self._tick())
        try:
            while True:
                client, sender, frame = await self._resources.socket.receive()
                try:
                    self._handle(client, decode_from(sender, frame))
                except MalformedMessage as error:
                    self._drop(str(error))
                except Exception:  # of this message alone: the agent goes on with the next
                    log.exception("message could not be handled")
                    self._drop("see above")
                self._wake()
                await asyncio.sleep(0)  # let the threads' reports in, however many messages come
        finally:
            ticker.cancel()

    async def _tick(self) -> None:
        resources = self._resources
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._poll()
                resources.deliver_queue.expire()
                resources.pull_queue.expire()
                self._state.release_quarantine()
                resources.announcer.status(self._status())
            except Exception:  # a bug in one of the steps: the next tick takes them all again
                log.exception("tick failed")

    def close(self) -> None:
        """Give everything back; takes seconds only if a disk or peer hangs."""
        self._resources.close()

    def _drop(self, reason: str) -> None:
        self._resources.counters.malformed_total += 1
        log.warning("message dropped reason=%s", reason)

    def _wake(self) -> None:
        """From any thread: have the store polled in the loop, once however often asked."""
        if not self._poll_due:
            self._poll_due = True
            try:
                self._loop.call_soon_threadsafe(self._poll)
            except RuntimeError:
                log.debug("the loop is closed")

    def _poll(self) -> None:
        self._poll_due = False
        self._state.poll()

    # ---- messages -----------------------------------------------------------------------

    def _handle(self, client: bytes, message: Message) -> None:
        match message:
            case Ping(term=term):
                self._greet(client)
                if term:
                    self._heeds(client, term)
            case Subscribe():
                self._greet(client)
                self._resources.announcer.subscribe(client, self._state.holdings())
            case KnownEngines(term=term):
                if self._heeds(client, term):
                    self._resources.meet(message)
                    self._state.keep_engines(self._resources.engines)
            case ForgetWeights(term=term):
                if self._heeds(client, term):
                    self._state.forget_weights(message)
            case RegisterEngine():
                self._register(client, message)
            case ReadShare(plan=plan):
                if self._resources.leader.has_given(plan):
                    self._state.read_share(client, message)
                else:
                    self._resources.socket.send(client, Superseded(self._resources.leader.term))
            case ReleasePlan():
                self._state.release(message.plan)
            case Deliver() | PullBlocks() | CancelJob():
                self._state.job(client, message)
            case KeepWitness():
                self._compare_witness(client, message)
            case AskFence():
                self._state.fence(client, message)
            case _:
                raise MalformedMessage(f"{type(message).__name__} is not for agents")

    def _heeds(self, client: bytes, term: int) -> bool:
        """Whether a gateway that says it is active is the one to obey. If it is a new one, nobody
        needs the plans of those before it: their slots are for its own."""
        leader = self._resources.leader
        before = leader.term
        if not leader.heard(term):
            self._resources.socket.send(client, Superseded(leader.term))
            return False
        if leader.term > before:
            self._state.release_before(PlanId(leader.term))
        return True

    def _register(self, client: bytes, message: RegisterEngine) -> None:
        try:
            if message.engine not in self._resources.engines:
                raise BadRegistration(f"engine {message.engine} has left the cluster")
            resources = self._resources
            check_registration(message, resources.clock.now(), resources.memory.size_bytes)
            self._state = self._state.opened_for(message)
            self._state.register(client, message)
        except BadRegistration as error:
            raise MalformedMessage(str(error)) from error
        self._greet(client)

    def _compare_witness(self, client: bytes, message: KeepWitness) -> None:
        resources, digest = self._resources, message.namespace_digest

        def answer(kept: list[bytes]) -> None:
            reply = KeptWitness(digest, kept)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                resources.post(lambda: resources.socket.send(client, reply))

        values = message.values if message.may_keep else b""
        resources.witnesses.compare(digest, values, answer)

    def _greet(self, client: bytes) -> None:
        resources = self._resources
        hello = AgentHello(
            resources.config.name,
            resources.incarnation,
            resources.peer.session_id,
            self._state.credit_address(client),
        )
        resources.socket.send(client, hello)

    # ---- status -------------------------------------------------------------------------

    def _status(self) -> AgentStatus:
        resources, stats = self._resources, self._state.stats()
        deliver_queue_bytes, deliver_bytes_per_s = resources.deliver_queue.load()
        load = AgentLoad(
            agent=resources.config.name,
            incarnation=resources.incarnation,
            read_queue_bytes=stats.read_queue_bytes,
            read_bytes_per_s=stats.read_bytes_per_s,
            deliver_queue_bytes=deliver_queue_bytes,
            deliver_bytes_per_s=deliver_bytes_per_s,
            dram_slots=stats.slots,
            dram_slots_free=stats.slots_available,
        )
        term = resources.leader.present_term
        return AgentStatus(load, reported(self._samples(stats)), resources.heard, term)

    def _samples(self, stats: StoreStats) -> Iterator[Sample]:
        resources, state = self._resources, self._state
        queue_bytes, bytes_per_s = resources.deliver_queue.load()
        yield from resources.counters.samples()
        yield from store_samples(stats)
        yield from resources.moved.samples(resources.peer.moved_bytes())
        yield from pacer_samples(resources.pacing.pacers())
        yield sample("agent_jobs", len(resources.deliver_queue), kind="delivery")
        yield sample("agent_jobs", len(resources.pull_queue), kind="pull")
        yield sample("agent_deliver_queue_bytes", queue_bytes)
        yield sample("agent_deliver_bytes_per_second", bytes_per_s)
        yield from state.fence_samples()
