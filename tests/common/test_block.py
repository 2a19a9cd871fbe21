"""Names of blocks and of the parts beside them."""

from __future__ import annotations

import pytest

from common.block import BlockKey, BlockLayout, Namespace, Part, part_key
from common.ids import PlanId
from common.messages.from_gateway import EnginePlan

KEY = BlockKey(b"k" * 32)
PLAIN = Namespace("m" * 64, "v1", "bfloat16", BlockLayout(64, 4, (4096, 4096)), '{"a":1}', 2)
SPARSE = Namespace("m" * 64, "v1", "bfloat16", BlockLayout(64, 4, (4096, 512), 1, ((), (1, 3))))
WINDOW = Part("window", BlockLayout(64, 4, (4096, 4096), 1, ((1, 3), (1, 3))), 2)


def test_blocks_that_were_stored_before_there_were_parts_are_found() -> None:
    recorded = "92f31b13222d97e070946b07fa47b083755dbc18ebaa36e6e92ba34d408a636c"
    assert PLAIN.digest().hex() == recorded
    recorded = "962507ffe6799847f8f61bc601b577380d2ed0e883b4045387d18b40d3a421ac"
    assert SPARSE.digest().hex() == recorded


def test_parts_are_in_the_namespace() -> None:
    def with_part(part: Part) -> bytes:
        return Namespace("m", "1", "float32", BlockLayout(64, 4, (8,)), parts=(part,)).digest()

    wider = Part("window", WINDOW.layout, 3)
    longer = Part("window", BlockLayout(64, 4, (8192, 4096), 1, WINDOW.layout.absent), 2)
    assert len({with_part(WINDOW), with_part(wider), with_part(longer)}) == 3


def test_an_object_of_a_part_has_a_key_of_its_own() -> None:
    keys = {
        KEY,
        part_key("window", KEY),
        part_key("state", KEY),
        part_key("state", BlockKey(b"o" * 32)),
    }
    assert len(keys) == 4 and all(len(key) == 32 for key in keys)


def test_a_hit_needs_the_window_before_its_end() -> None:
    assert [list(WINDOW.needed(blocks)) for blocks in (0, 1, 2, 5)] == [[], [0], [0, 1], [3, 4]]


@pytest.mark.parametrize(
    ("part_readers", "fault"),
    [
        ([[0, 1]], ""),
        ([[0], [1]], ""),
        ([[0, 2]], "reader 2 of 2 agents"),
        ([[0, 0, 0]], "more readers of a part than the 2 blocks"),
    ],
)
def test_a_plan_whose_parts_nobody_can_deliver(part_readers: list[list[int]], fault: str) -> None:
    keys, agents = [KEY, KEY], ["a0", "a1"]
    plan = EnginePlan(PlanId(1), "r", bytes(32), keys, agents, [0, 0], 1.0)
    assert plan.fault == ""
    plan = EnginePlan(
        PlanId(1), "r", bytes(32), keys, agents, [0, 0], 1.0, part_readers=part_readers
    )
    assert plan.fault == fault
