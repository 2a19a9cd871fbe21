"""Any order of writes, crashes, power cuts, damage and drops: never a wrong byte, and what was
acknowledged is there while there is room for it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from common.block import NO_PARENT, UNLABELLED, BlockKey, BlockLabel, tenant_digest
from storage.index.owners import Quota, Selector
from storage.ssd.slab import slot_bytes_for
from storage.ssd.tier import SsdTier
from storage.tiers.contract import BlockCorrupt, BlockIO, BlockMissing
from tests.examples import examples
from tests.storage.conftest import finish, key_of, no_wake, payload_of
from tests.storage.ssd.slab_files import flip, lose_tables, stored

NBYTES = 5000
SLOT_BYTES = slot_bytes_for(NBYTES)
KEYS = [key_of(i) for i in range(12)]
BOUNDED, FREE = "bounded", "free"
TENANT_OF = {key: BOUNDED if i % 3 == 0 else FREE for i, key in enumerate(KEYS)}
QUOTA_BLOCKS = 2


def label_of(key: BlockKey) -> BlockLabel:
    number = KEYS.index(key)
    return msgspec.structs.replace(
        UNLABELLED,
        tenant=tenant_digest(TENANT_OF[key]),
        parent=KEYS[number - 3] if number >= 3 else NO_PARENT,
    )


class SsdMachine(RuleBasedStateMachine):
    """``kept``: acknowledged since, not dropped, not damaged, and of the tenant without quota."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="dualpath-machine-"))
        self.folder = self.root / "0"
        self.kept: set[BlockKey] = set()
        self.damaged: set[BlockKey] = set()  # and not found out, so not written anew
        self.tier = self._open()

    def _open(self) -> SsdTier:
        quota = Quota(Selector.parse(f"tenant:{BOUNDED}"), QUOTA_BLOCKS * SLOT_BYTES)
        return SsdTier(self.folder, 32 * SLOT_BYTES, no_wake, threads=2, quotas=[quota])

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, min_size=1, max_size=6))
    def put(self, keys: list[BlockKey]) -> None:
        blocks = [BlockIO(key, memoryview(payload_of(key, NBYTES)), label_of(key)) for key in keys]
        self.tier.submit_writes(blocks)
        for key, completion in finish(self.tier, len(keys)).items():
            if completion.error is None and TENANT_OF[key] == FREE and key not in self.damaged:
                self.kept.add(key)
        bounded = [key for key in KEYS if TENANT_OF[key] == BOUNDED]
        assert sum(self.tier.contains(bounded)) <= QUOTA_BLOCKS

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, min_size=1, max_size=6))
    def get(self, keys: list[BlockKey]) -> None:
        buffers = {key: bytearray(NBYTES) for key in keys}
        self.tier.submit_reads([BlockIO(key, memoryview(b)) for key, b in buffers.items()])
        for key, completion in finish(self.tier, len(keys)).items():
            if completion.error is None:
                assert buffers[key] == payload_of(key, NBYTES)
                assert completion.label == label_of(key)
            else:
                assert isinstance(completion.error, BlockCorrupt | BlockMissing)
                assert key not in self.kept, "an acknowledged block is lost"
                self.damaged.discard(key)

    @rule(tenant=st.sampled_from([BOUNDED, FREE]))
    def drop(self, tenant: str) -> None:
        self.tier.drop(Selector.parse(f"tenant:{tenant}"))
        gone = [key for key in KEYS if TENANT_OF[key] == tenant]
        assert not any(self.tier.contains(gone))
        self.kept.difference_update(gone)
        self.damaged.difference_update(gone)

    @rule()
    def restart(self) -> None:
        self.tier.close()
        self.tier = self._open()

    @rule(loses_tables=st.booleans())
    def crash(self, loses_tables: bool) -> None:
        """The folder as it is this moment, while the tier has it open."""
        copy = self.root / str(int(self.folder.name) + 1)
        shutil.copytree(self.folder, copy)
        self.tier.close()
        shutil.rmtree(self.folder)
        self.folder = copy
        if loses_tables:
            lose_tables(copy)
        self.tier = self._open()

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), at=st.integers(0, SLOT_BYTES - 1))
    def damage(self, data: st.DataObject, at: int) -> None:
        places = dict(stored(self.folder))
        key = data.draw(st.sampled_from(sorted(places)))
        flip(places[key].path, places[key].offset + at)
        self.kept.discard(key)
        self.damaged.add(key)

    def teardown(self) -> None:
        try:
            self.get(KEYS)
        finally:
            self.tier.close()
            shutil.rmtree(self.root)


TestSsd = SsdMachine.TestCase
TestSsd.settings = examples(30, stateful_step_count=15)
