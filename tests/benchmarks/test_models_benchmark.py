"""The benchmark of model families: its prompts, its controls and its goals."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from benchmarks.models import conversations, exchange
from benchmarks.models.before import DELIVERY, STORE_READS, STORE_WRITES, ratio_of
from benchmarks.models.cluster import Answer
from benchmarks.models.exchange import Kind, kinds_of, moves
from benchmarks.models.verdict import goals_of, hit_ratio, is_seen, read_ratio, speed_goals
from benchmarks.models.walk import (
    COLD,
    KILLED,
    SSD,
    Asked,
    Control,
    Measured,
    by_what_they_show,
    margin_of,
)
from common.block import BlockKey, BlockLabel, BlockLayout
from storage.block_format import HEADER_BYTES, encode_header, verify
from storage.remote.packs.format import PackBuilder


def test_prompts_end_around_pages_windows_and_tracks():
    async def answer(prompt: list[int]) -> list[int]:
        return [7] * 12

    talks = asyncio.run(conversations.converse(30, answer))
    assert sum(map(len, talks)) == 30
    ends = {(len(prompt) + 1) % unit for talk in talks for prompt in talk for unit in (64, 256)}
    assert {0, 1, 2} <= ends
    for talk in talks:
        for before, after in zip(talk, talk[1:], strict=False):
            assert after[: len(before) + 12] == before + [7] * 12 and len(after) > len(before) + 12
    assert max(len(talk[0]) for talk in talks) == conversations.LONG_TOKENS
    assert len({len(prompt) for talk in talks for prompt in talk}) > 15


def test_prompts_end_around_larger_pages_too_and_have_right_answers():
    asked: list[int] = []

    async def answer(prompt: list[int]) -> list[int] | None:
        asked.append(len(prompt))
        return [7] * 12 if len(asked) % 3 == 0 else None

    talks = asyncio.run(conversations.converse(30, answer, page_tokens=256))
    lengths = [len(prompt) for talk in talks for prompt in talk]
    assert asked == [length for length in lengths for _ in range(3)]
    ends = [(length + 1) % 256 for length in lengths]
    assert all(ends.count(end) >= 3 for end in (0, 1, 2))
    for talk in talks:
        for before, after in zip(talk, talk[1:], strict=False):
            assert after[: len(before) + 12] == before + [7] * 12


def test_a_prompt_without_a_right_answer_is_not_drawn_for_ever():
    async def answer(prompt: list[int]) -> None:
        return None

    with pytest.raises(conversations.NoPrompt, match="63 tokens"):
        asyncio.run(conversations.converse(3, answer))


SPARSE = BlockLayout(4, 4, (10, 3), absent=((), (1,)))


def test_a_component_is_exchanged_between_the_layers_that_have_it():
    starts = [SPARSE.layer_start(layer) + 10 for layer in (0, 2, 3)]
    places = [slice(start, start + 3) for start in starts]
    assert sorted(moves(SPARSE, Kind("", 1)), key=str) == sorted(
        zip(places, places[-1:] + places[:-1], strict=True), key=str
    )
    assert moves(BlockLayout(4, 1, (8,)), Kind("", 0)) == [
        (slice(0, 4), slice(4, 8)),
        (slice(4, 8), slice(0, 4)),
    ]


def test_parts_of_one_state_are_one_control():
    state = BlockLayout(4, 1, (8, 2))
    kinds = kinds_of({"": BlockLayout(4, 2, (8,)), "state0": state, "state1": state})
    assert kinds == [Kind("", 0), Kind("state", 0), Kind("state", 1)]


def test_a_control_of_a_draft_leaves_the_model_as_it_is():
    layout = BlockLayout(4, 3, (8,), draft_layers=1)
    assert kinds_of({"": layout}) == [Kind("", 0, draft=True)]
    assert moves(layout, Kind("", 0, draft=True)) == [(slice(16, 24), slice(0, 8))]


def test_objects_of_a_store_are_whole_after_an_exchange_and_no_others_change(tmp_path):
    layout = BlockLayout(4, 2, (4, 2), shards=2)
    payload = bytes(range(12))
    labels = [BlockLabel(bytes(32), layout, part=part) for part in ("", "window")]
    pack, builder = b"", PackBuilder()
    for number, label in enumerate(labels):
        key = BlockKey(bytes([number]) * 32)
        builder.add(key, len(payload), 5, label)
        pack += encode_header(key, payload, label, 0, 5) + payload
    path = tmp_path / "a.pack"
    path.write_bytes(pack + builder.footer())
    assert exchange.layouts(tmp_path) == {"": layout, "window": layout}
    assert exchange.exchange(tmp_path, Kind("window", 0)) == 1
    first, second = HEADER_BYTES, 2 * HEADER_BYTES + len(payload)
    data = path.read_bytes()
    assert data[: first + 12] == pack[: first + 12]
    # Two shards of two layers, each of two bytes and one.
    assert data[second : second + 12] == bytes([3, 4, 2, 0, 1, 5, 9, 10, 8, 6, 7, 11])
    header = data[second - HEADER_BYTES : second]
    assert (
        verify(header, data[second : second + 12], BlockKey(bytes([1]) * 32)).label.part == "window"
    )


ASKED = Asked(COLD, "split", 0, 1, 300, right=True, cached_tokens=128, longest_tokens=256)


def asked(**fields: object) -> Asked:
    return msgspec.structs.replace(ASKED, **fields)


def test_hits_and_bytes_are_compared_with_what_there_could_have_been():
    some = [
        asked(),
        asked(cached_tokens=320),
        asked(longest_tokens=0, cached_tokens=64),
        asked(what=KILLED, cached_tokens=0),
    ]
    assert hit_ratio(some) == (128 + 256) / 512
    assert hit_ratio(some[2:]) is None and read_ratio(some) is None
    reads = [asked(what=SSD, read_bytes=10, needed_bytes=10), asked(read_bytes=2, needed_bytes=2)]
    assert read_ratio([*reads, asked(read_bytes=3)]) == 15 / 12


def test_controls_are_asked_with_prompts_that_end_behind_their_hit():
    prompts = [[0] * length for length in (512, 513, 600, 1025, 1087, 1089)]
    first = by_what_they_show(prompts, page_tokens=256)
    assert [len(prompt) for prompt in first] == [1087, 1025, 513, 1089, 600, 512]
    assert [len(prompt) for prompt in by_what_they_show(prompts, 64)][:2] == [1089, 1087]


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({}, True),
        ({"differ": 2}, False),
        ({"hits": 2}, False),
        ({"objects": 0}, False),
        ({"faint": True, "differ": 1}, True),
        ({"faint": True, "differ": 0}, False),
        ({"faint": True, "differ": 1, "hits": 2}, False),
        ({"accepted": 3.0, "accepted_plain": 4.8, "differ": 0}, True),
        ({"accepted": 4.0, "accepted_plain": 4.8, "differ": 0}, False),
        ({"accepted": 3.0, "accepted_plain": 4.8, "differ": 1}, False),
    ],
)
def test_a_control_counts_if_all_of_its_hits_show(fields, seen):
    control = Control("kv/0", objects=9, asked=3, hits=3, differ=3)
    assert is_seen(msgspec.structs.replace(control, **fields)) is seen


def test_every_goal_is_there_when_nothing_was_measured():
    goals = goals_of("tiny", None) + speed_goals({})
    assert len({goal.name for goal in goals}) == len(goals) == 9
    assert not any(goal.holds for goal in goals)


def test_goals_of_a_family_with_a_draft():
    drafted = [
        asked(cached_tokens=0, longest_tokens=0, turn=0, accepted=1.5, accepted_plain=1.5),
        asked(accepted=1.2, accepted_plain=1.5, right=False),
    ]
    found = Measured(drafted, [Control("kv/0", 1, 1, 1, 1)], readers_killed=2, has_draft=True)
    values = {goal.name.split(": ")[1]: goal.value for goal in goals_of("tiny-mtp", found)}
    assert values["answers that differ from plain SGLang's"] == 1
    assert values["acceptance cold, of plain SGLang's"] == 1
    assert values["acceptance restored, of plain SGLang's"] == pytest.approx(0.8)
    assert (values["prompts"], values["controls seen, of all"]) == (2, 1)


def test_a_speed_is_compared_with_that_measured_beside_it():
    speeds = {f"{STORE_READS}, 64 KiB": [(2.0, 1.0), (8.0, 4.0), (1.0, 100.0)]}
    speeds |= {f"{STORE_READS}, 1024 KiB": [(1.0, 2.0)], DELIVERY: [(3.0, 2.0)]}
    assert ratio_of(speeds, STORE_READS) == pytest.approx(1.0)
    assert ratio_of(speeds, DELIVERY) == pytest.approx(1.5)
    assert ratio_of(speeds, STORE_WRITES) is None


def test_of_another_token_it_is_said_how_likely_that_was():
    right = Answer([5, 6, 7], margins=[1.0, 0.01, 2.0])
    assert margin_of(Answer([5, 9, 8]), right) == 0.01
    assert margin_of(Answer([5, 6, 7]), right) is None
    assert margin_of(Answer([4]), Answer([5])) is None
