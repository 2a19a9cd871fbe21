"""An agent's stand-in."""

from __future__ import annotations

from typing import Any

from common import messages as m
from common.block import BlockKey, BlockLayout, Namespace, TierName
from common.loads import AgentLoad
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
            case m.Ping():
                return [
                    m.AgentHello(self.name, self.incarnation, "host:1"),
                    self.status(),
                ]
            case m.Subscribe():
                self.sequence = 0
                return [self.announcement(self.held, snapshot=True)]
            case m.ReadShare() if not self.slow:
                return [self.share(message)]
        return []

    def status(self) -> m.AgentStatus:
        queued, rates = {TierName.SSD: 0}, {TierName.SSD: 1e9}
        load = AgentLoad(self.name, self.incarnation, queued, rates, 0, 1e9, 100, 100)
        return m.AgentStatus(load, self.samples, self.heard)

    def share(self, message: m.ReadShare) -> m.ShareRead:
        in_dram = [key not in self.lost for key in message.keys]
        read = {self.tier: NAMESPACE.layout.block_bytes * sum(in_dram)}
        return m.ShareRead(message.plan, in_dram, read, 0.01, 0.02)

    def announcement(self, keys: list[BlockKey], snapshot: bool) -> m.Announcement:
        changes = [m.Holding(key, self.tier, True) for key in keys]
        news = m.Announcement(self.incarnation, self.sequence, snapshot, changes)
        self.sequence += 1
        return news
