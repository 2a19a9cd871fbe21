"""Answers that are aborted in their midst, versions of weights, and the loss mask."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.rollout.answers import Span
from launch.rollout.groups.version_log import VersionLog
from tests.examples import examples
from tests.launch.rollout.jobs import (
    CHAT,
    errors,
    kept,
    run,
    samples,
    summary,
    text_rows,
    what_was_sampled,
    write_jsonl,
)
from tests.launch.rollout.stub import logprob, text_ids


def test_an_aborted_answer_is_continued_with_all_that_it_had(stub, tmp_path):
    """What it generates is what it would have been, and each token has the version that made it."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a prompt"}])
    flags = ("--max-new-tokens", "12", "--temperature", "0")
    assert run(source, tmp_path / "whole", stub.url, *flags) == 0
    stub.set(cut=2, cut_tokens=3, versions=["v2", "v3"])
    assert run(source, tmp_path / "cut", stub.url, *flags, "--logprobs") == 0
    (whole,) = samples(tmp_path / "whole")
    (cut,) = samples(tmp_path / "cut")
    prompt = len(text_ids("a prompt"))
    end = len(whole["token_ids"])
    assert cut["token_ids"] == whole["token_ids"] and cut["messages"] == whole["messages"]
    assert cut["finish_reason"] == whole["finish_reason"]
    spans = [(s["version"], s["begin"], s["end"]) for s in cut["weight_versions"]]
    cuts = [prompt, prompt + 3, prompt + 6, end]
    assert spans == list(zip(["v1", "v2", "v3"], cuts[:-1], cuts[1:], strict=True))
    assert (cut["weight_version"], cut["staleness_commits"]) == ("v1", 2)
    assert cut["loss_mask"] == [0] * prompt + [1] * (end - prompt)
    (turn,) = cut["turns"]
    assert [s["generated_tokens"] for s in turn["segments"]] == [3, 3, end - prompt - 6]
    assert [s["finish_reason"] for s in turn["segments"]][:2] == ["abort", "abort"]
    assert (turn["attempts"], turn["prompt_tokens"]) == (3, prompt)
    for begin, stop in zip(cuts[:-1], cuts[1:], strict=True):
        sent = whole["token_ids"][:begin]
        expected = [logprob(sent, place) for place in range(begin, stop)]
        assert cut["logprobs"][begin:stop] == pytest.approx(expected, abs=1e-6)
    assert (summary(tmp_path / "cut")["requests"], summary(tmp_path / "cut")["continued"]) == (3, 2)


def test_tokens_of_old_weights_are_out_of_the_loss_and_keep_their_logprobs(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a prompt"}])
    flags = ("--max-new-tokens", "12", "--logprobs")
    for limit, old in (("0", 6), ("1", 3), ("2", 0)):
        stub.set(cut=2, cut_tokens=3, versions=["v2", "v3"], weight_version="v1")
        output = tmp_path / limit
        assert run(source, output, stub.url, *flags, "--loss-staleness-commits", limit) == 0
        (row,) = samples(output)
        prompt = row["prompt_tokens"]
        generated = len(row["token_ids"]) - prompt
        assert row["loss_mask"][prompt:] == [0] * old + [1] * (generated - old)
        assert None not in row["logprobs"][prompt:]


def test_a_turn_that_was_cut_at_its_last_token_has_reached_its_length(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    stub.set(cut=1, cut_tokens=4)
    assert run(source, tmp_path / "out", stub.url, "--max-new-tokens", "4") == 0
    (row,) = samples(tmp_path / "out")
    assert (row["finish_reason"], row["turns"][0]["generated_tokens"]) == ("length", 4)
    assert len(row["messages"][-1]["content"]) in (3, 4)


def test_what_is_aborted_for_ever_is_given_up(stub, tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", [{"prompt": "a"}])
    stub.set(cut=1 << 30, cut_tokens=0)
    assert run(source, tmp_path / "out", stub.url, "--retry-s", "0.6") == 3
    (failure,) = errors(tmp_path / "out")
    assert "without a new token" in failure["reason"]


def test_what_was_begun_otherwise_is_begun_anew(stub, tmp_path):
    """An unfinished sample without log-probabilities is of no use to a job that wants them."""
    source, output = write_jsonl(tmp_path / "in.jsonl", text_rows(2)), tmp_path / "out"
    stub.set(slow=["0."])
    flags = ("--groups", "1", "--oversample-groups", "1", "--concurrency", "8")
    assert run(source, output, stub.url, *flags) == 0
    assert [s["sample"] for s in kept(output) if s["row"] == 0] == [0]
    stub.set(slow=[])
    assert run(source, output, stub.url, *flags, "--logprobs", "--extend") == 0
    begun, _ = samples(output)
    assert len(begun["turns"][0]["segments"]) == 1
    assert None not in begun["logprobs"][begun["prompt_tokens"] :]


def test_in_the_midst_of_an_episode_too(stub, tmp_path):
    """Each turn of each sample: the environment sees whole answers only."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"messages": CHAT, "length": 3}])
    talker = "tests.launch.rollout.test_rollout_episodes:Talker"
    flags = ("--env", talker, "--n", "2", "--max-new-tokens", "6", "--concurrency", "1")
    assert run(source, tmp_path / "whole", stub.url, *flags) == 0
    stub.set(cut=5, cut_tokens=1)
    assert run(source, tmp_path / "cut", stub.url, *flags) == 0
    whole, cut = what_was_sampled(tmp_path / "whole"), what_was_sampled(tmp_path / "cut")
    assert [r["token_ids"] for r in cut] == [r["token_ids"] for r in whole]
    assert [r["messages"] for r in cut] == [r["messages"] for r in whole]
    assert summary(tmp_path / "cut")["continued"] == 5


@examples(100)
@given(st.lists(st.one_of(st.just("commit"), st.just("ask"), st.integers(0, 20)), max_size=30))
def test_the_order_of_versions_is_that_of_the_commits(events):
    """However few of them the job asks for: answers name those that they span, up to the one that
    is served."""
    with tempfile.TemporaryDirectory() as folder:
        log = VersionLog(Path(folder) / "versions")
        log.served("0")
        now, seen = 0, {0}
        for event in events:
            if event == "commit":
                now += 1
            elif event == "ask":
                log.served(str(now))
                seen.add(now)
            else:
                spanned = range(min(event, now), now + 1)
                log.heard([Span(str(v), i, i + 1) for i, v in enumerate(spanned)])
                seen |= set(spanned)
            assert log.versions == [str(v) for v in sorted(seen)]
        assert VersionLog(Path(folder) / "versions").versions == log.versions
        for version in seen:
            assert log.behind_commits(str(version)) == len([v for v in seen if v > version])


def test_a_version_between_two_that_are_known_is_put_between_them(tmp_path):
    log = VersionLog(tmp_path / "versions")
    log.served("1")
    log.served("4")
    log.heard([Span("1", 0, 3), Span("2", 3, 5), Span("4", 5, 6)])
    log.heard([Span("3", 0, 2), Span("4", 2, 6)])
    assert log.versions == ["1", "2", "3", "4"]
    assert [log.behind_commits(v) for v in log.versions] == [3, 2, 1, 0]
    log.served("2")  # the trainer went back to it
    assert log.behind_commits("2") == 0 and log.behind_commits("4") == 1
