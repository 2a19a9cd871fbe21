"""An agent's stand-in."""

from __future__ import annotations

from typing import Any

from common.block import BlockKey, BlockLayout, Namespace, TierName
from common.loads import AgentLoad
from common.messages.fields import Ping
from common.messages.from_agents import AgentHello, AgentStatus, Announcement, Holding, ShareRead
from common.messages.from_gateway import ReadShare, Subscribe
from common.samples import sample
from tests.launch.gateway.control_stub import ControlStub

PAGE_TOKENS = 4
NAMESPACE = Namespace("model", "1", "float32", BlockLayout(PAGE_TOKENS, 2, (8, 8)))


class StubAgent(ControlStub):
    """Holds ``held`` blocks; answers a share at once, or never if ``slow``."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.held: list[BlockKey] = []
        self.tier = TierName.SSD
        self.slow = False
        self.lost: set[BlockKey] = set()
        self.samples = [sample("agent_storage_read_bytes_total", 5, tier="ssd")]
        self.sequence = 0

    def answers(self, message: Any) -> list[Any]:
        match message:
            case Ping():
                return [
                    AgentHello(self.name, self.incarnation, "host:1"),
                    self.status(),
                ]
            case Subscribe():
                self.sequence = 0
                return [self.announcement(self.held, snapshot=True)]
            case ReadShare() if not self.slow:
                return [self.share(message)]
        return []

    def status(self) -> AgentStatus:
        queued, rates = {TierName.SSD: 0}, {TierName.SSD: 1e9}
        load = AgentLoad(self.name, self.incarnation, queued, rates, 0, 1e9, 100, 100)
        return AgentStatus(load, self.samples, self.heard, self.leader.present_term)

    def share(self, message: ReadShare) -> ShareRead:
        in_dram = [key not in self.lost for key in message.keys]
        read = {self.tier: NAMESPACE.layout.block_bytes * sum(in_dram)}
        return ShareRead(message.plan, in_dram, read, 0.01, 0.02)

    def announcement(self, keys: list[BlockKey], snapshot: bool) -> Announcement:
        changes = [Holding(key, self.tier, True) for key in keys]
        news = Announcement(self.incarnation, self.sequence, snapshot, changes)
        self.sequence += 1
        return news
