"""Traces become sessions, prompts and the hit rate that they imply."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.replay.__main__ import DEFAULT_TRACE
from benchmarks.trace import (
    BadTrace,
    PromptMaker,
    SeenBlocks,
    TraceRequest,
    choose_sessions,
    load_trace,
    possible_blocks,
    sessions_of,
)

EIGHTH = PromptMaker(Fraction(1, 8))


def request(line: int, ids: tuple[int, ...], tokens: int = 0, output: int = 8) -> TraceRequest:
    return TraceRequest(line, line * 1000, tokens or 512 * len(ids), output, ids)


def test_sessions_share_more_than_the_common_prefix():
    a1, b1, a2, lone = (0, 1, 2), (0, 5), (0, 1, 2, 3), (0,)
    sessions = sessions_of([request(i, ids) for i, ids in enumerate((a1, b1, a2, lone, lone))])
    assert [[r.line for r in s] for s in sessions] == [[0, 2], [1], [3], [4]]


def test_a_trace_of_one_conversation_is_one_session():
    sessions = sessions_of([request(0, (0, 1)), request(1, (0, 1, 2))])
    assert [len(s) for s in sessions] == [2]


def test_without_a_common_block_the_first_one_decides():
    sessions = sessions_of([request(i, ids) for i, ids in enumerate([(0, 1), (5, 6), (0, 9)])])
    assert [[r.line for r in s] for s in sessions] == [[0, 2], [1]]


def test_sessions_with_turns_are_chosen_before_others():
    requests = [request(i, ids) for i, ids in enumerate([(0, 1), (0, 2), (0, 3), (0, 2, 9)])]
    assert [[r.line for r in s] for s in choose_sessions(requests, 1)] == [[1, 3]]
    assert [[r.line for r in s] for s in choose_sessions(requests, 2)] == [[0], [1, 3]]


def test_equal_ids_are_equal_tokens_and_lengths_scale_alike():
    turns = EIGHTH.turns([[request(0, (0, 1, 2), 1500, 3), request(1, (0, 1, 7, 8), 2000, 800)]])
    assert [len(t.prompt) for t in turns] == [188, 250]
    assert [t.output_tokens for t in turns] == [1, 100]
    assert turns[0].prompt[:128] == turns[1].prompt[:128]
    assert turns[0].prompt[128:188] != turns[1].prompt[128:188]
    assert all(300 <= token < 2000 for turn in turns for token in turn.prompt)
    assert turns == EIGHTH.turns(
        [[request(0, (0, 1, 2), 1500, 3), request(1, (0, 1, 7, 8), 2000, 800)]]
    )


@pytest.mark.parametrize("scale", [Fraction(1, 3), Fraction(1, 1024), Fraction(0)])
def test_a_scale_without_whole_blocks_is_refused(scale):
    with pytest.raises(BadTrace, match="scale"):
        PromptMaker(scale).prompt(request(0, (0,)))


def test_implied_hits_stop_before_the_last_token():
    seen, prompt = SeenBlocks(), list(range(128))
    assert seen.hit_blocks(prompt) == 0
    seen.completed(prompt, [5])
    assert seen.hit_blocks(prompt) == 1 == possible_blocks(128)
    assert seen.hit_blocks([*prompt, 1]) == 2
    assert seen.hit_blocks([9, *prompt[1:], 1]) == 0, "a page counts only after equal ones"


def test_generated_tokens_are_seen_except_the_last():
    seen, prompt = SeenBlocks(), list(range(60))
    seen.completed(prompt, [1, 2, 3, 4])
    assert seen.hit_blocks([*prompt, 1, 2, 3, 4, 9]) == 0, "the last one's KV was never computed"
    seen.completed(prompt, [1, 2, 3, 4, 5])
    assert seen.hit_blocks([*prompt, 1, 2, 3, 4, 9]) == 1


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), max_size=12))
def test_implied_hits_equal_the_longest_common_prefix(chains):
    seen, done = SeenBlocks(), []
    for chain in chains:
        prompt = [token for h in chain for token in [h] * 64] + [99]
        shared = [
            next(
                (i for i, (x, y) in enumerate(zip(chain, old, strict=False)) if x != y),
                min(len(chain), len(old)),
            )
            for old in done
        ]
        assert seen.hit_blocks(prompt) == max(shared, default=0)
        seen.completed(prompt, [1])
        done.append(chain)


@pytest.mark.parametrize("line", ["not json", "{}", "[]", '{"timestamp": 0}'])
def test_a_bad_line_is_named(tmp_path, line):
    good = json.dumps({"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [0]})
    path = tmp_path / "t.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(BadTrace, match="t.jsonl:2"):
        load_trace(path)


def test_missing_hashes_and_empty_files_are_refused(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp":0,"input_length":513,"output_length":1,"hash_ids":[0]}\n')
    with pytest.raises(BadTrace, match="fewer hash_ids"):
        load_trace(path)
    path.write_text("")
    with pytest.raises(BadTrace, match="empty"):
        load_trace(path)


def test_the_cut_in_the_repository_is_enough_for_the_default():
    assert Path(DEFAULT_TRACE).stat().st_size < 300_000
    sessions = choose_sessions(load_trace(DEFAULT_TRACE), 30)
    assert len(sessions) == 30 and all(len(s) > 1 for s in sessions)
    turns = EIGHTH.turns(sessions)
    seen, implied = SeenBlocks(), 0
    for turn in turns:
        implied += seen.hit_blocks(turn.prompt)
        seen.completed(turn.prompt, [])
    possible = sum(possible_blocks(len(turn.prompt)) for turn in turns)
    assert implied / possible > 0.5, "worth measuring hits on"
