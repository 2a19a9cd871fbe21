"""A request that ends an engine ends no second one; who was there with it is answered."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from common.ids import Incarnation
from common.messages.from_engines import EngineEnds
from launch.gateway.errors import Poisoned
from launch.gateway.request import attempt, suspects
from launch.gateway.request.parts import GENERATE as PATH
from launch.gateway.request.parts import Part
from launch.gateway.request.suspects import Fingerprint, Fingerprints, Guilt, Suspects
from tests.launch.gateway.client import GENERATE, PROMPT, metric, post
from tests.launch.gateway.stubs import StubCluster, StubEngine
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

POISON = {**GENERATE, "extra_key": "poison"}
REFUSED = 'dualpath:requests_total{endpoint="/generate",outcome="poison_refused"}'
NOW = Incarnation(7)


def mark(text: str) -> Fingerprint:
    return Fingerprint(Part(path=PATH, body={"text": text}, rid=text, index=0), "tenant")


def deadly(cluster: StubCluster, role: str, last_words: bool) -> list[StubEngine]:
    engines = cluster.prefills if role == "prefill" else cluster.decodes
    for engine in engines:
        engine.dies_of, engine.last_words = "poison", last_words
    return engines


def send(cluster: StubCluster, body: Any) -> asyncio.Task[tuple[int, Any, Any]]:
    return asyncio.create_task(post(cluster, "/generate", body))


# ---- whom to blame ------------------------------------------------------------------------


async def test_who_is_named_alone_is_poison_and_who_is_not_named_a_bystander() -> None:
    found = Suspects(pairs=lambda: 1)
    a, b, c = map(mark, "abc")
    found.aboard = {"1": a, "2": b, "3": c, "4": mark("a")}  # asked twice
    assert found.guilt("p0", NOW, a) is Guilt.SUSPECT
    found.engine_lost("p0", NOW, ["1", "4", "unknown"])
    assert [found.guilt("p0", NOW, one) for one in (a, b)] == [Guilt.POISON, Guilt.BYSTANDER]
    found.engine_lost("p0", NOW, ["1", "2"])
    verdicts = [found.guilt("p0", NOW, one) for one in (a, b, c)]
    assert verdicts == [Guilt.SUSPECT, Guilt.SUSPECT, Guilt.BYSTANDER]
    assert found.guilt("p0", Incarnation(NOW + 1), c) is Guilt.SUSPECT  # another loss
    found.engine_lost("p0", NOW, [])
    assert {found.guilt("p0", NOW, one) for one in (a, b, c)} == {Guilt.SUSPECT}


async def test_who_began_alone_is_to_blame_unless_others_are_named() -> None:
    found = Suspects(pairs=lambda: 1)
    a, b, c = map(mark, "abc")
    found.aboard = {"1": a, "2": b, "3": c}
    async with found.alone(a) as slot:
        slot.take(["p0", "d0"])
        found.engine_lost("d0", NOW, [])
        verdicts = {found.guilt("d0", NOW, one) for one in (a, b, c)}
        assert verdicts == {Guilt.SUSPECT}, "nobody has sent it there yet"
        slot.begun = True
        for named, poison in (([], a), (["1", "2"], a), (["2"], b)):
            found.engine_lost("d0", NOW, named)
            for one in (a, b, c):
                expected = Guilt.POISON if one is poison else Guilt.BYSTANDER
                assert found.guilt("d0", NOW, one) is expected
        slot.release()
        found.engine_lost("d0", NOW, [])
        assert found.guilt("d0", NOW, a) is Guilt.SUSPECT


async def test_no_more_suspects_begin_than_there_are_pairs() -> None:
    pairs = 2
    found = Suspects(pairs=lambda: pairs)
    begun: list[int] = []
    most, ended = 0, asyncio.Event()

    async def one(number: int) -> None:
        nonlocal most
        async with found.alone(mark(str(number))) as slot:
            slot.take([f"p{number}"])
            begun.append(number)
            most = max(most, len(found.beginning))
            await (ended.wait() if number < 2 else asyncio.sleep(0))

    tasks = [asyncio.create_task(one(number)) for number in range(100)]
    await asyncio.sleep(0.01)
    assert (begun, found.waiting) == ([0, 1], 98)
    for cancelled in (tasks[2], tasks[0]):
        cancelled.cancel()
    await asyncio.wait([tasks[0]])
    pairs = 0  # one may begin nevertheless
    ended.set()
    await asyncio.wait(tasks)
    assert begun == [0, 1, *range(3, 100)] and most == 2
    assert found.waiting == 0 and found.beginning == {}


async def test_fingerprints_are_of_what_is_computed_for_whom_and_are_forgotten(monkeypatch) -> None:
    now = [0.0]
    known = Fingerprints(lambda: now[0])
    body = {"text": "a", "sampling_params": {"x": 1, "y": 2}, "stream": True}
    again = {"sampling_params": {"y": 2, "x": 1}, "text": "a", "priority": 3}

    def of(fields: dict[str, Any], tenant: str = "t", path: str = PATH) -> Fingerprint:
        return Fingerprint(Part(path=path, body=fields, rid="any", index=3), tenant)

    assert not known.suspected(of(body))
    known.note(of(body), refused=False)
    assert known.suspected(of(again))
    for other in (of({**body, "text": "b"}), of(body, tenant="u"), of(body, path="/other")):
        assert not known.suspected(other)
    known.acquit(of(again))
    assert len(known) == 0
    known.note(of(body), refused=True)
    with pytest.raises(Poisoned, match="refused for 600 s more"):
        known.suspected(of(again))
    now[0] = suspects.REMEMBERED_S + 1
    assert not known.suspected(of(again)) and len(known) == 0
    monkeypatch.setattr(suspects, "REMEMBERED_MAX", 10)
    for number in range(20):
        known.note(mark(str(number)), refused=False)
    assert len(known) == 10 and known.suspected(mark("19")) and not known.suspected(mark("9"))


# ---- at a gateway -------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_engine_that_names_a_request_is_the_only_one_that_it_ends(role: str) -> None:
    async with cluster_of(prefills=2, decodes=2) as cluster:
        engines = deadly(cluster, role, last_words=True)
        for engine in cluster.engines:
            engine.word_delay_s = 0.2
        neighbours = [send(cluster, {**GENERATE, "stream": True}) for _ in range(4)]
        await cluster.until(lambda: sum(len(e.bodies) for e in cluster.decodes) == 4)
        status, answer, trace = await send(cluster, POISON)
        assert (status, trace["attempts"]) == (422, 1)
        assert "ends the engine" in answer["error"]["message"]
        for again in ({**POISON, "rid": "x", "stream": True}, POISON):
            status, answer, _ = await send(cluster, again)
            assert status == 422 and "is refused for" in answer["error"]["message"]
        assert await metric(cluster, REFUSED) == 2
        assert sum(len(engine.deaths) for engine in engines) == 1
        assert {(await sent)[0] for sent in neighbours} == {200}
        assert (await send(cluster, {**POISON, "extra_key": "harmless"}))[0] == 200


async def test_a_silent_death_makes_all_suspects_of_whom_one_is_found_out(monkeypatch) -> None:
    monkeypatch.setattr(attempt, "FIRST_STEPS_S", 0.02)
    async with cluster_of(prefills=3, decodes=3) as cluster:
        engines = deadly(cluster, "prefill", last_words=False)
        busy = engines[0]
        for engine in engines[1:]:  # so that all are at one
            engine.load_changes = {"pending_tokens": 10_000_000}
        known = cluster.services.scheduler.state.engines
        await cluster.until(lambda: (known.pending_tokens > 0).sum() == 2)
        busy.faults = ["hang"] * 40
        sent = [send(cluster, {**GENERATE, "text": f"{i} is here"}) for i in range(40)]
        await cluster.until(lambda: len(busy.bodies) == 40)
        poison = send(cluster, POISON)
        await cluster.until(lambda: busy.deaths)
        for engine in engines[1:]:
            engine.load_changes = {}
        answers = [await task for task in sent]
        assert [status for status, _, _ in answers] == [200] * 40
        assert {trace["prefill"] for _, _, trace in answers} & {busy.name} == set()
        status, _, trace = await poison
        assert (status, trace["attempts"]) == (422, 2)
        assert sum(len(engine.deaths) for engine in engines) == 2
        assert (await send(cluster, POISON))[0] == 422
        assert sum(len(engine.deaths) for engine in engines) == 2
        services = cluster.services
        assert len(services.suspects.fingerprints) == 1
        assert services.suspects.aboard == services.suspects.beginning == {}


async def test_of_two_that_are_named_the_innocent_one_is_answered() -> None:
    async with cluster_of(prefills=3, decodes=3) as cluster:
        engines = deadly(cluster, "prefill", last_words=True)
        first = engines[0]
        first.faults = ["hang"]
        innocent = send(cluster, GENERATE)
        await cluster.until(lambda: first.bodies)
        first.at_work = [first.bodies[0]["rid"]]
        for engine in engines[1:]:
            engine.load_changes = {"pending_tokens": 10_000_000}
        known = cluster.services.scheduler.state.engines
        await cluster.until(lambda: (known.pending_tokens > 0).sum() == 2)
        poison = send(cluster, POISON)
        await cluster.until(lambda: first.deaths)
        for engine in engines[1:]:
            engine.load_changes = {}
        assert (await innocent)[0] == 200
        assert (await poison)[0] == 422
        assert sum(len(engine.deaths) for engine in engines) == 2


async def test_a_request_that_fails_where_engines_live_is_no_suspect() -> None:
    async with cluster_of(prefills=2, decodes=2) as cluster:
        for engine in cluster.prefills:
            engine.faults = ["close"]
        status, answer, _ = await send(cluster, GENERATE)
        assert status == 502 and "failed twice" in answer["error"]["message"]
        assert len(cluster.services.suspects.fingerprints) == 0


def suspect(cluster: StubCluster, monkeypatch: Any, text: str) -> None:
    """Whoever asks for that has been at an engine that was lost."""

    def suspected(fingerprint: Any) -> bool:
        return fingerprint._part.text == text

    monkeypatch.setattr(cluster.services.suspects.fingerprints, "suspected", suspected)


async def test_a_suspect_that_must_wait_for_another_holds_nobody_up(monkeypatch) -> None:
    async with cluster_of() as cluster:
        suspect(cluster, monkeypatch, "both")
        found = cluster.services.suspects
        found._pairs = lambda: 2  # as before one of two was drained
        cluster.prefills[0].faults = ["hang"]
        first = send(cluster, {**GENERATE, "text": "both"})
        await cluster.until(lambda: cluster.prefills[0].bodies)
        assert found.beginning.keys() == {"p0", "d0"}
        second = send(cluster, {**GENERATE, "text": "both"})
        await cluster.until(lambda: found._slots_taken == 2)
        assert (await send(cluster, GENERATE))[0] == 200
        assert not second.done() and cluster.services.outage.waiting == 0
        first.cancel()
        assert (await second)[0] == 200


async def test_suspects_that_wait_for_one_another_wait_no_longer_for_an_engine(monkeypatch) -> None:
    async with cluster_of(engine_wait_s=1.0) as cluster:
        suspect(cluster, monkeypatch, PROMPT)
        cluster.services.plane.members.engines["d0"].ended = cluster.decodes[0].incarnation
        begun_s = asyncio.get_running_loop().time()
        sent = [send(cluster, GENERATE) for _ in range(6)]
        assert {(await task)[0] for task in sent} == {503}
        assert asyncio.get_running_loop().time() - begun_s < 6


async def test_pairs_are_of_processes_that_take_requests() -> None:
    async with cluster_of(prefills=2, decodes=2) as cluster:
        plane, orders = cluster.services.plane, cluster.services.orders
        engines = plane.members.engines
        assert plane.pairs() == 2
        orders.drain("p0", True)
        assert plane.pairs() == 1
        orders.drain("p0", False)
        one = engines["d0"].address.http
        engines["d1"].address = msgspec.structs.replace(engines["d1"].address, http=one, group=1)
        assert plane.pairs() == 1
        assert plane.members.of_one_process(["p0", "d1"]) == {"p0", "d0", "d1"}


async def test_last_words_that_come_after_the_loss_count() -> None:
    async with cluster_of() as cluster:
        plane, found, guilty = cluster.services.plane, cluster.services.suspects, mark("a")
        peer = plane.members.engines["p0"]
        found.aboard["1"] = guilty
        plane.http_state(peer, alive=False)
        assert found.guilt("p0", peer.incarnation, guilty) is Guilt.SUSPECT
        await cluster.prefills[0].push(EngineEnds(peer.incarnation, ["1"], "an error"))
        await cluster.until(lambda: peer.ended is not None)
        assert found.guilt("p0", peer.incarnation, guilty) is Guilt.POISON
