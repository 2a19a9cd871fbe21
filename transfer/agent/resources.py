"""What an agent has from its start, whichever engines come."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from functools import partial

from common.cluster.clock import ClusterClock
from common.cluster.leader import Leader
from common.ids import Incarnation
from common.messages.from_gateway import KnownEngines
from common.process_settings import incarnation
from common.tracing.spans import make_tracer
from storage.remote.tier import RemoteTier
from storage.ssd.tier import DiskBroken, SsdTier
from storage.tiers.contract import Tier, Wake
from storage.witnesses import Witnesses
from transfer.agent.announcer import Announcer
from transfer.agent.config import AgentConfig
from transfer.agent.control_socket import ControlSocket
from transfer.agent.jobs.transfer_queue import TransferQueue
from transfer.agent.metrics import AgentCounters
from transfer.control.keys import Keys
from transfer.control.senders import GATEWAY, LAUNCHER
from transfer.credits import CreditBoard
from transfer.memory import HostMemory
from transfer.mooncake import TransferPeer
from transfer.pacing import nics
from transfer.pacing.agent_pacing import AgentPacing, PaceSettings
from transfer.pacing.peer_nics import MovedBytes, PeerNics
from transfer.ports.member_hosts import MemberHosts
from transfer.ports.source_filter import admit_only
from transfer.traffic.host import keeps_apart

log = logging.getLogger(__name__)

TRANSFERS_MAX = 4096
"""Of deliveries, and likewise of pulls, that wait or run."""
PULL_THREADS = 2
QUEUE_STOP_S = 0.5


class Resources:
    """Registered memory, the ways to clients, peers and storage, and the queues of transfers.

    ``wake``: called from any thread when a tier has news. Start errors are those of the parts.
    """

    def __init__(self, config: AgentConfig, wake: Wake) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self.incarnation = incarnation() or Incarnation(int(time.time() * 1000))
        self.clock = ClusterClock()
        self.clock.note(self.incarnation)
        self.counters = AgentCounters()
        self.tracer = make_tracer(config.otlp_traces_endpoint, "dualpath-agent", config.name)
        self.peer = _start_peer(config)
        self._hosts = MemberHosts(config.heard)
        admit_only(config.heard)  # not the control port's, whose clients prove who they are
        keys = Keys(config.name, config.control_secret)
        self.engines = frozenset(config.engines)
        """Names of those that may register."""
        self.heard = 0
        """Number of the last ``KnownEngines``."""
        self.leader = Leader()
        self.socket = ControlSocket(config.control, keys, [GATEWAY, LAUNCHER, *self.engines])
        self.announcer = Announcer(self.incarnation, self.socket.send)
        self.memory = HostMemory(config.dram_bytes)
        self.peer.register(self.memory.address, self.memory.size_bytes)
        self.credits = CreditBoard(self.peer.register)
        self.ssd, self.remote = _open_tiers(config, wake)
        keepers = [tier.keepers for tier in (self.ssd, self.remote) if tier is not None]
        self.witnesses = Witnesses(itertools.chain.from_iterable(keepers))
        peer_nics = PeerNics(self.peer.is_local, is_rdma=config.protocol == "rdma")
        self.moved = MovedBytes(peer_nics, "agent")
        self.pacing = AgentPacing(
            PaceSettings(config.pace, config.nic_bytes_per_s, config.rdma_devices),
            peer_nics,
            self._needed_rate,
            partial(keeps_apart, group=config.cgroup),
        )
        self.deliver_queue = self._queue("deliver", config.deliver_threads)
        self.pull_queue = self._queue("pull", PULL_THREADS)

    def meet(self, known: KnownEngines) -> None:
        """Let these engines in."""
        others = frozenset() if known.complete else self.engines
        self.engines = others.union(known.names)
        self._hosts.meet(known.hosts, known.complete)
        self.heard = known.number
        self.clock.note(known.number)
        self.socket.let_in([GATEWAY, LAUNCHER, *self.engines])

    def post(self, call: Callable[[], object]) -> None:
        """Run a call in the loop's thread; from any thread. RuntimeError: the loop is closed."""
        self._loop.call_soon_threadsafe(call)

    def _queue(self, name: str, threads: int) -> TransferQueue:
        return TransferQueue(
            self.peer, name, threads, TRANSFERS_MAX, self.post, self.pacing.pacer_towards
        )

    def _needed_rate(self, now: float, counts: Callable[[str], bool]) -> float:
        return self.deliver_queue.needed_rate(now, counts)

    @property
    def tiers(self) -> list[Tier]:
        """Those below DRAM that are switched on, the faster first."""
        return [tier for tier in (self.ssd, self.remote) if tier is not None]

    def close(self) -> None:
        """Give everything back; takes seconds only if a disk or peer hangs."""
        self.deliver_queue.close(QUEUE_STOP_S)
        self.pull_queue.close(QUEUE_STOP_S)
        self.witnesses.close()
        for tier in self.tiers:
            tier.close()
        self.socket.close()
        self.tracer.close()


def _start_peer(config: AgentConfig) -> TransferPeer:
    """With RDMA, through the NICs near the node's engine first."""
    topology: nics.Topology = {}
    if config.protocol == "rdma":  # untested: no such machine was at hand
        own = [gpu for gpu in nics.gpus() if gpu.index in config.gpus]
        usable = nics.usable(nics.rdma_nics(), config.rdma_devices)
        topology = nics.agent_topology(usable, own, nics.numa_node_count())
        log.info("NICs to use, and those to go over to: %s", topology)
    with nics.given_to_mooncake(topology):
        return TransferPeer(config.host, config.protocol, config.rdma_devices)


def _open_tiers(config: AgentConfig, wake: Wake) -> tuple[SsdTier | None, RemoteTier | None]:
    """SSD and remote tier, None where switched off."""
    remote = None
    ssd = _open_ssd(config, wake) if config.ssd_dirs else None
    if config.remote_url:
        remote = RemoteTier(config.remote_url, config.remote_options, wake, config.remote)
    return ssd, remote


def _open_ssd(config: AgentConfig, wake: Wake) -> SsdTier | None:
    """None if its disks are broken: they may have become so under an earlier process, which had
    gone on without them, and the node must not be lost with them."""
    try:
        return SsdTier(
            config.ssd_dirs,
            config.ssd_bytes,
            wake,
            config.read_threads,
            config.ssd_min_free_bytes,
            config.ssd_quotas,
        )
    except DiskBroken as error:
        log.error("goes on without an SSD tier: %s", error)
        return None
