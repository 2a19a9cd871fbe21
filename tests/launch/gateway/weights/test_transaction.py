"""One weight update at all engines, as SGLang's trainers send it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from common.messages.from_gateway import ForgetWeights
from launch.gateway.peers import control_plane
from tests.launch.gateway.client import GENERATE, TEXT, post
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of
from tests.launch.gateway.weights.trained_engine import TrainedEngine

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

AS_SENT = json.loads((Path(__file__).parent / "as_sent.json").read_text())
DISK = {"model_path": "/weights/B", "weight_version": "1"}
TENSORS = {"serialized_named_tensors": ["gAJdcQAu"], "weight_version": "1"}  # an empty list


@pytest.fixture(autouse=True)
def often(monkeypatch) -> None:
    monkeypatch.setattr(control_plane, "PING_S", 0.05)


def two_by_two(**config: Any) -> Any:
    return cluster_of(prefills=2, decodes=2, engine=TrainedEngine, **config)


async def call(cluster: StubCluster, path: str, body: Any = None) -> Any:
    status, answer, _ = await post(cluster, f"/{path}", body or {})
    assert status == 200, answer
    return answer


def names(cluster: StubCluster) -> set[tuple[str, str]]:
    return {(e.namespace.model_digest, e.namespace.weight_version) for e in cluster.engines}


def engines(cluster: StubCluster) -> list[Any]:
    return sorted(cluster.engines, key=lambda e: (e.role == "decode", e.name))


@pytest.mark.parametrize("trainer", AS_SENT)
async def test_what_trainers_send_reaches_every_engine(trainer: str) -> None:
    """In their order; afterwards all serve under one name, whatever they call it."""
    async with two_by_two() as cluster:
        for path, method, body in AS_SENT[trainer]:
            sent = dict(body or {})
            if path == "/init_weights_update_group":
                sent["world_size"] = 5
            if "serialized_named_tensors" in sent:
                sent["serialized_named_tensors"] = TENSORS["serialized_named_tensors"]
            async with cluster.http.request(method, path, json=sent or None) as answer:
                assert answer.status == 200, (path, await answer.text())
        if cluster.services.view()["weights"]["held_by"]:  # memory, of which some comes back later
            await call(cluster, "resume_memory_occupation")
        assert (await post(cluster, "/generate", GENERATE))[1]["text"] == TEXT
        assert len(names(cluster)) == 1
        first, *others = engines(cluster)
        assert first.calls and all(other.paths() == first.paths() for other in others)


async def test_requests_wait_while_the_weights_change_and_none_is_lost() -> None:
    async with two_by_two() as cluster:
        await call(cluster, "pause_generation")
        waiting = [asyncio.create_task(post(cluster, "/generate", GENERATE)) for _ in range(3)]
        await cluster.until(lambda: cluster.services.admission.queued == 3)
        await call(cluster, "update_weights_from_disk", DISK)
        async with cluster.http.get("/health") as health:
            assert (await health.json())["status"] == "ok"
        assert not any(one.done() for one in waiting)
        await call(cluster, "continue_generation")
        assert {(await one)[0] for one in waiting} == {200}
        assert names(cluster) == {("digest of /weights/B", "1")}
        view = cluster.services.view()["weights"]
        assert view == {"version": "1", "name": "1", "held_by": []}


async def test_a_version_is_a_label_and_each_update_a_name_of_its_own() -> None:
    async with two_by_two() as cluster:
        seen = set()
        for _ in range(2):  # two jobs, which both begin at 1
            await call(cluster, "update_weights_from_tensor", TENSORS)
            (name,) = names(cluster)
            seen.add(name)
            assert cluster.services.view()["weights"]["version"] == "1"
        assert len(seen) == 2


async def test_agents_are_told_of_names_that_nobody_will_have_again() -> None:
    """The shared store's part is one agent's to do. Weights of a folder may come back."""

    def told(cluster: StubCluster) -> list[ForgetWeights]:
        received = [m for agent in cluster.agents.values() for m in agent.received]
        return [message for message in received if isinstance(message, ForgetWeights)]

    async with two_by_two() as cluster:
        await call(cluster, "update_weights_from_disk", DISK)
        await call(cluster, "update_weights_from_tensor", TENSORS)
        ((_, name),) = names(cluster)
        assert name.endswith("/1")
        await call(cluster, "update_weights_from_disk", DISK)
        await cluster.until(lambda: len(told(cluster)) == 2)
        assert {message.version for message in told(cluster)} == {name}
        assert sorted(message.shared for message in told(cluster)) == [False, True]
        await call(cluster, "update_weights_from_disk", DISK)
        assert len(told(cluster)) == 2


async def test_a_session_is_opened_around_a_call_of_a_trainer_that_opens_none() -> None:
    async with two_by_two() as cluster:
        await call(cluster, "update_weights_from_tensor", TENSORS)
        begin, end = "begin_weight_update", "end_weight_update"
        tensors = "update_weights_from_tensor"
        assert all(engine.paths() == [begin, tensors, end] for engine in engines(cluster))
        await call(cluster, begin)
        await call(cluster, tensors, TENSORS)
        await call(cluster, end)
        assert all(e.paths() == [begin, tensors, end] * 2 for e in engines(cluster))


async def test_ranks_of_all_engines_follow_each_other_in_a_group() -> None:
    async with two_by_two() as cluster:
        for engine in cluster.prefills:
            engine.ranks = 2
        body = {"rank_offset": 1, "world_size": 7, "group_name": "job", "master_port": "44950"}
        await call(cluster, "init_weights_update_group", body)
        offsets = [engine.calls[-1][1]["rank_offset"] for engine in engines(cluster)]
        assert offsets == [1, 3, 5, 6]
        status, answer, _ = await post(
            cluster, "/init_weights_update_group", {**body, "world_size": 3}
        )
        assert status == 400 and not answer["success"] and "7 at least" in answer["message"]


async def test_an_engine_that_does_not_take_an_update_gets_no_requests() -> None:
    async with two_by_two() as cluster:
        odd = cluster.decodes[0]
        odd.refuses = {"update_weights_from_disk"}
        status, answer, _ = await post(cluster, "/update_weights_from_disk", DISK)
        assert status == 400 and answer["message"] == f"{odd.name}: no update_weights_from_disk"
        for _ in range(4):
            assert (await post(cluster, "/generate", GENERATE))[0] == 200
        assert odd.bodies == []
        odd.refuses = set()
        await call(cluster, "update_weights_from_disk", DISK)
        assert len(names(cluster)) == 1
        for _ in range(4):
            await post(cluster, "/generate", GENERATE)
        assert odd.bodies


async def test_an_update_goes_on_without_an_engine_that_dies_in_its_midst() -> None:
    """It comes back with the weights that it began with, and takes those of the others' folder."""
    async with two_by_two() as cluster:
        lost = cluster.prefills[1]
        lost.dying = "update_weights_from_disk"
        answer = await call(cluster, "update_weights_from_disk", DISK)
        assert lost.name in answer["message"]
        assert len(names(cluster)) == 2
        await lost.restart()
        await cluster.until(lambda: len(names(cluster)) == 1)
        await cluster.until(lambda: not cluster.services.plane.members.strangers())
        for _ in range(4):
            assert (await post(cluster, "/generate", GENERATE))[0] == 200
        assert lost.bodies
        assert lost.weights.state.version == DISK["weight_version"]


async def test_an_engine_begins_anew_where_no_folder_has_the_weights() -> None:
    """It stays out until the next update."""
    async with two_by_two() as cluster:
        await call(cluster, "update_weights_from_disk", DISK)
        await call(cluster, "update_weights_from_tensor", TENSORS)
        lost = cluster.prefills[1]
        await lost.die()
        await lost.restart()
        peer = cluster.services.plane.members.engines[lost.name]
        members = cluster.services.plane.members
        await cluster.until(lambda: peer.incarnation == lost.incarnation and members.alive(peer))
        for _ in range(4):
            assert (await post(cluster, "/generate", GENERATE))[0] == 200
        assert lost.bodies == []
        await call(cluster, "update_weights_from_disk", DISK)
        assert len(names(cluster)) == 1


async def test_the_cluster_is_one_server_of_all_engines_ranks() -> None:
    """Not a prefill one, whichever engine is asked: trainers size their groups by it."""
    async with two_by_two() as cluster:
        cluster.decodes[0].ranks = 2
        for path in ("/server_info", "/get_server_info", "/server_info"):
            async with cluster.http.get(path) as answer:
                info = await answer.json()
            assert (info["disaggregation_mode"], info["num_gpus"]) == ("null", 5)


async def test_all_that_failed_alike_have_the_weights_that_they_had() -> None:
    async with two_by_two() as cluster:
        before = names(cluster)
        for engine in cluster.engines:
            engine.refuses = {"update_weights_from_disk"}
        status, answer, _ = await post(cluster, "/update_weights_from_disk", DISK)
        assert status == 400 and not answer["success"]
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
        assert names(cluster) == before


async def test_engines_that_a_trainer_updates_itself_are_named_once_all_are() -> None:
    async with two_by_two(engine_wait_s=20) as cluster:
        for engine in engines(cluster)[:3]:
            engine.weights.changed("1", is_clean=True)
        await asyncio.sleep(0.3)
        last = engines(cluster)[3]
        assert all(not e.weights.state.is_named for e in cluster.engines if e is not last)
        last.weights.changed("1", is_clean=True)
        await cluster.until(lambda: len(names(cluster)) == 1)
        assert (await post(cluster, "/generate", GENERATE))[0] == 200


async def test_what_comes_of_older_kv_goes_under_a_name_that_ends_with_the_flush() -> None:
    async with two_by_two() as cluster:
        cluster.decodes[0].kv_left = True
        await call(cluster, "pause_generation", {"mode": "in_place"})
        await call(cluster, "update_weights_from_disk", {**DISK, "flush_cache": False})
        await call(cluster, "continue_generation")
        (doubtful,) = names(cluster)
        assert doubtful[0] != "digest of /weights/B"
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
        async with cluster.http.post("/flush_cache") as answer:
            assert answer.status == 200
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
        assert names(cluster) == {("digest of /weights/B", "1")}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_a_pause_ends_before_its_first_token_begins_again(
    stream: bool,
) -> None:
    async with cluster_of(engine=TrainedEngine) as cluster:
        (decode,) = cluster.decodes
        decode.faults = ["ordered late"]
        request = asyncio.create_task(post(cluster, "/generate", {**GENERATE, "stream": stream}))
        await cluster.until(lambda: bool(decode.bodies))
        await call(cluster, "pause_generation")
        assert not request.done()
        await call(cluster, "update_weights_from_disk", DISK)
        await call(cluster, "continue_generation")
        status, _, trace = await request
        assert (status, trace["attempts"]) == (200, 2)


async def test_who_is_no_operator_changes_no_weights() -> None:
    async with cluster_of(engine=TrainedEngine) as cluster:
        headers = {"x-forwarded-for": "10.0.0.9"}
        for path in ("pause_generation", "update_weights_from_disk", "weights_checker"):
            async with cluster.http.post(f"/{path}", json=DISK, headers=headers) as answer:
                assert answer.status == 403
        assert all(engine.paths() == [] for engine in engines(cluster))
