"""The benchmark of weight updates: its clients, its trainer, and how answers are judged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from benchmarks.models.cluster import Answer
from benchmarks.weights import judge as judging
from benchmarks.weights import load, updates
from benchmarks.weights.cases import (
    ABORT,
    DISK,
    DISTRIBUTED,
    IN_PLACE,
    MODES,
    RETRACT,
    TENSOR,
    WAYS,
    WITH_A_KILL,
    Case,
    is_changed,
    make_cases,
)
from benchmarks.weights.judge import Judge, Judged, Tokens
from benchmarks.weights.load import NEW_TOKENS, Clients, Piece
from benchmarks.weights.updates import Trainer, Update
from benchmarks.weights.verdict import Records, Seen, figures, make_goals
from launch.rollout.answers import SglangSpan

# ---- cases ----------------------------------------------------------------------------------


def test_every_way_is_done_in_every_mode_and_one_comes_behind_the_kill():
    cases = make_cases()
    assert {(case.way, case.mode) for case in cases} == {(w, m) for w in WAYS for m in MODES}
    assert cases[cases.index(WITH_A_KILL) + 1].way == DISTRIBUTED  # its group is joined anew
    assert make_cases((TENSOR,), (RETRACT,))[-2:] == [WITH_A_KILL, Case(DISK, ABORT)]
    assert make_cases((DISK,), (RETRACT,)) == [Case(DISK, RETRACT)]


def test_versions_go_to_and_fro():
    assert [is_changed(version) for version in ("default", "1", "2", "3")] == [False, True] * 2


# ---- clients --------------------------------------------------------------------------------


class Server:
    """Gives as many tokens as it is asked for; what is in ``cuts`` is aborted after so many."""

    def __init__(self, *cuts: int) -> None:
        self.cuts = list(cuts)
        self.asked: list[dict[str, Any]] = []
        self.calls: list[tuple[str, Any]] = []

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        wanted = body["sampling_params"]["max_new_tokens"]
        count = self.cuts.pop(0) if self.cuts else wanted
        meta = {
            "finish_reason": {"type": "length" if count == wanted else "abort"},
            "weight_version": "1",
            "cached_tokens": 64,
        }
        given = {"output_ids": list(range(count)), "meta_info": meta}
        if not body["stream"]:
            return web.json_response(given)
        events = [{"output_ids": [0]}, given]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return web.Response(text=text + "data: [DONE]\n\n")

    async def call(self, request: web.Request) -> web.Response:
        self.calls.append((request.path, await request.json()))
        refused = request.path == "/flush_cache" and len(self.paths) < 3
        return web.json_response({}, status=400 if refused else 200)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def serve(self) -> TestServer:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_post("/{call}", self.call)
        return TestServer(app)


async def test_what_a_pause_has_cut_is_sent_again_with_its_tokens():
    server = Server(10, 0)
    async with server.serve() as served, ClientSession() as http:
        clients = Clients(http, str(served.make_url("")).rstrip("/"), seed=1)
        clients.apart = " apart"
        tokens = await clients._answer([7, 8], "salt", stream=True)
        assert {body["cache_salt"] for body in server.asked} == {"salt apart"}
    assert tokens == [*range(10), *range(NEW_TOKENS - 10)]
    assert [piece.reason for piece in clients.pieces] == ["abort", "abort", "length"]
    first, _, last = clients.pieces
    assert last.prompt == [7, 8, *range(10)] and last.wanted == NEW_TOKENS - 10
    assert [count for _, count in first.events] == [1, 10]
    assert first.spans == [SglangSpan("1", 0, 10)] and first.cached_tokens == 64


async def test_requests_are_lost_that_end_without_their_tokens():
    async with ClientSession() as http:
        clients = Clients(http, "http://127.0.0.1:1", seed=1)
        assert await clients._answer([7], "salt", stream=False) is None
    assert "127.0.0.1" in clients.pieces[0].lost
    piece = Piece([7], 4, sent_s=1.0)
    meta = {"finish_reason": {"type": "length"}, "weight_version": "1"}
    given = {"output_ids": [1], "meta_info": meta}
    load._take(piece, 200, msgspec.json.encode(given))
    assert piece.lost == "1 of 4 tokens"
    for status, text in ((503, b'{"error": {}}'), (200, b'{"error": {}}'), (200, b"")):
        load._take(piece := Piece([7], 4, sent_s=1.0), status, text)
        assert piece.lost.startswith(str(status))


def test_the_first_token_of_a_version_is_found_in_a_stream():
    spans = [SglangSpan("1", 0, 3), SglangSpan("2", 3, 6)]
    events = [(11.0, 2), (12.0, 3), (14.0, 5), (15.0, 6)]
    piece = Piece([7], 6, 10.0, 15.5, list(range(6)), spans, events=events)
    assert [piece.first_token_s(version) for version in "123"] == [11.0, 14.0, None]
    assert msgspec.structs.replace(piece, events=[]).first_token_s("2") == 15.5


# ---- a trainer ------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two tensors, without the time that it takes to load and share real ones."""
    monkeypatch.setattr(updates, "tensors_of", lambda folder: [("a", folder), ("b", folder)])
    monkeypatch.setattr(updates, "serialized", lambda half: repr(half))
    yield


@pytest.mark.usefixtures("prepared")
async def test_a_trainer_calls_as_trainers_do(tmp_path):
    server, folders = Server(), {False: tmp_path / "first", True: tmp_path / "other"}
    midst: list[int] = []
    async with server.serve() as served, ClientSession() as http:
        trainer = Trainer(http, str(served.make_url("")).rstrip("/"), folders, ranks=4)
        kept = await trainer.update(Case(DISK, ABORT), lambda: midst.append(0))
        assert server.paths == [
            *("/pause_generation", "/flush_cache", "/flush_cache"),
            *("/update_weights_from_disk", "/continue_generation"),
        ]
        body = server.calls[3][1]
        assert body["model_path"] == str(folders[True]) and body["weight_version"] == "1"
        assert kept.version == "1" and kept.begun_s <= kept.updated_s <= kept.committed_s
        server.calls.clear()
        await trainer.update(Case(TENSOR, IN_PLACE), lambda: midst.append(len(server.calls)))
    assert server.paths == [
        *("/pause_generation", "/begin_weight_update"),
        *("/update_weights_from_tensor", "/update_weights_from_tensor"),
        *("/end_weight_update", "/continue_generation"),
    ]
    assert midst == [3]  # between the halves
    assert str(folders[False]) in server.calls[2][1]["serialized_named_tensors"][0]


# ---- answers --------------------------------------------------------------------------------

MARGIN = 1.0


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    """Of weights whose tokens count on from the prompt's last one, the changed ones' from ten times
    that. Behind a 4 the next token is no more likely than another."""

    async def ask(http: Any, url: str, prompt: list[int], count: int, margins: bool) -> Answer:
        begin = prompt[-1] * (10 if url == "changed" else 1) + 1
        tokens = list(range(begin, begin + count))
        return Answer(tokens, margins=[0.0 if t == 5 else MARGIN for t in tokens])

    monkeypatch.setattr(judging, "ask", ask)
    return Judge(None, {False: "first", True: "changed"})


async def test_tokens_are_compared_with_those_of_their_weights(judge: Judge):
    compare = judge.compare
    assert await compare(False, [1], [2, 3]) == Tokens(right=2)
    assert await compare(True, [1], [11, 12]) == Tokens(right=2)
    assert await compare(True, [1], [11, 13, 14]) == Tokens(right=1, wrong=2)
    # a tie; what follows it is compared with what follows the other token
    assert await compare(False, [3], [4, 9, 10, 12]) == Tokens(right=2, wrong=1, ties=1)


def piece(sent_s: float, *spans: SglangSpan, tokens: list[int], **more: Any) -> Piece:
    return Piece([1], len(tokens), sent_s, sent_s + 1, tokens, list(spans), **more)


UPDATE = Update("1", begun_s=100.0, updated_s=101.0, committed_s=102.0)


async def test_each_span_is_of_its_own_weights(judge: Judge):
    both = piece(99, SglangSpan("default", 0, 2), SglangSpan("1", 2, 4), tokens=[2, 3, 31, 32])
    stale = piece(103, SglangSpan("default", 0, 2), tokens=[2, 3])
    late = piece(103, SglangSpan("1", 0, 2), tokens=[11, 12])
    found = await judge.judge(Case(DISK, RETRACT), UPDATE, [both, stale, late])
    assert found.before == Tokens(right=2)
    assert found.after == Tokens(right=4, wrong=2)
    assert found.others == 1  # the weights before would have given 2, 3
    went_on = piece(99, SglangSpan("default", 0, 2), SglangSpan("1", 2, 4), tokens=[2, 3, 77, 78])
    found = await judge.judge(Case(DISK, IN_PLACE), UPDATE, [went_on, late])
    assert found.after == Tokens(right=2) and found.went_on == 2


# ---- goals ----------------------------------------------------------------------------------


def seen(case: Case, first_s: float, judged: Judged | None = None, **more: Any) -> Seen:
    """One answer, whose first token under the new weights comes so long after the pause."""
    given = piece(102.5, SglangSpan("1", 0, 1), tokens=[11], **more)
    given.done_s = UPDATE.begun_s + first_s
    return Seen(case, UPDATE, [given], judged)


def values(records: Records, cases: list[Case]) -> list[tuple[float | None, bool]]:
    return [(goal.value, goal.holds) for goal in make_goals(records, cases)]


def test_goals_count_what_went_wrong():
    cases = [WITH_A_KILL, Case(DISK, ABORT)]
    good = Judged(after=Tokens(right=5), others=1)
    records = Records(
        plain=[seen(Case(TENSOR, ABORT), 3.0), seen(Case(DISK, ABORT), 3.0)],
        cluster=[
            seen(WITH_A_KILL, 3.5, good),
            seen(Case(DISK, ABORT), 4.5, good, engines=("p0", "p1", "d0", "d1")),
        ],
    )
    assert values(records, cases) == [
        *[(0.5, True), (1.5, False)],
        *[(0, True), (0, True), (0, True)],
        *[(1.0, True), (1, True), (4, True)],
    ]
    bad = Judged(Tokens(wrong=2), Tokens(wrong=1))
    records.cluster[1] = seen(Case(DISK, ABORT), 3.0, bad, lost="503", engines=("p0", "d0"))
    assert values(records, cases)[1:] == [
        *[(0.0, True), (1, False), (1, False), (2, False)],
        *[(0.5, False), (1, True), (2, False)],
    ]
    assert msgspec.json.encode(figures(records))


def test_what_was_not_measured_holds_nowhere():
    goals = make_goals(Records(), make_cases())
    assert not any(goal.holds for goal in goals)
