"""Agents that share a remote store, against a model of it, whatever they do in which order."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from unittest import mock

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from common.block import BlockKey, BlockLabel, BlockLayout
from storage.index.owners import Selector
from storage.remote.packs import upkeep as pack_upkeep
from storage.remote.tier import RemoteTier
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing
from tests.examples import examples
from tests.storage.conftest import QUICK, finish, key_of, no_wake, payload_of
from tests.storage.remote.pack_files import packs_in, read_pack

NBYTES = 700
KEYS = [key_of(i) for i in range(12)]
VERSIONS = ("a", "b")
LABELS = {
    key: BlockLabel(bytes([i % 2]) * 32, BlockLayout(64, 1, (8,)), weight_version=VERSIONS[i % 2])
    for i, key in enumerate(KEYS)
}
AGENTS = st.integers(0, 1)
SHARED = msgspec.structs.replace(QUICK, linger_s=0.0, pack_bytes=3000)


class SharedStore(RuleBasedStateMachine):
    """Agent 0 does the upkeep, all the time. ``stored`` are blocks that must be readable;
    of ``unsure`` ones only the bytes must be right."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.stored: set[BlockKey] = set()
        self.unsure: set[BlockKey] = set()
        self.patch = mock.patch.object(pack_upkeep, "MERGE_PACKS_MIN", 2)
        self.patch.start()

    @initialize()
    def open(self) -> None:
        self.agents = [self._agent(0), self._agent(1)]

    def _agent(self, number: int) -> RemoteTier:
        changed = msgspec.structs.replace(SHARED, upkeep_s=0.02 if number == 0 else 60.0)
        return RemoteTier(f"file://{self.root}", {}, no_wake, changed)

    def teardown(self) -> None:
        for agent in getattr(self, "agents", []):
            agent.close()
        self.patch.stop()
        shutil.rmtree(self.root)

    def _read(self, agent: int, key: BlockKey) -> bool:
        buffer = bytearray(NBYTES)
        self.agents[agent].submit_reads([BlockIO(key, memoryview(buffer))])
        error = finish(self.agents[agent], 1)[key].error
        if error is not None:
            assert isinstance(error, (BlockCorrupt, BlockMissing))
            return False
        assert buffer == payload_of(key, NBYTES)
        return True

    @rule(agent=AGENTS, keys=st.sets(st.sampled_from(KEYS), min_size=1, max_size=5))
    def write(self, agent: int, keys: set[BlockKey]) -> None:
        self.agents[agent].submit_writes(
            [BlockIO(key, memoryview(payload_of(key, NBYTES)), LABELS[key]) for key in keys]
        )
        assert all(c.error is None for c in finish(self.agents[agent], len(keys)).values())
        self.stored |= keys - self.unsure

    @rule(agent=AGENTS, key=st.sampled_from(KEYS))
    def read(self, agent: int, key: BlockKey) -> None:
        was_read = self._read(agent, key)
        assert was_read or key not in self.stored

    @rule(agent=AGENTS)
    def read_everything(self, agent: int) -> None:
        for key in sorted(self.stored):
            assert self._read(agent, key)

    @rule(agent=AGENTS)
    def restart(self, agent: int) -> None:
        self.agents[agent].close()
        self.agents[agent] = self._agent(agent)

    @rule(which=st.integers(0, 100), at=st.floats(0, 1), is_cut=st.booleans())
    def damage(self, which: int, at: float, is_cut: bool) -> None:
        packs = packs_in(self.root)
        if not packs:
            return
        path = packs[which % len(packs)]
        try:
            keys = set(read_pack(self.root, path).keys())
            data = bytearray(path.read_bytes())
        except Exception:  # rewritten meanwhile, or damaged before
            return
        data[int(at * (len(data) - 1))] ^= 0x10
        try:
            with path.open("r+b") as file:  # not made anew if it has gone
                file.write(data)
                file.truncate(int(at * len(data)) if is_cut else len(data))
        except FileNotFoundError:
            return
        self.unsure |= keys
        self.stored -= keys

    @rule(agent=AGENTS, version=st.sampled_from(VERSIONS))
    def drop(self, agent: int, version: str) -> None:
        dropped = {key for key in KEYS if LABELS[key].weight_version == version}
        drops = len(list(self.root.glob("drops/*.json")))
        self.agents[agent].drop(Selector.parse(f"version:{version}"))
        assert not any(self.agents[agent].contains(sorted(dropped)))
        self.stored -= dropped
        end = time.monotonic() + 10
        while len(list(self.root.glob("drops/*.json"))) == drops:
            assert time.monotonic() < end
            time.sleep(0.001)
        for number in range(len(self.agents)):  # a look for what nobody has
            assert not self._read(number, key_of(1000))
            assert not any(self._read(number, key) for key in dropped)


SharedStore.TestCase.settings = examples(25, stateful_step_count=15)
TestSharedStore = SharedStore.TestCase
