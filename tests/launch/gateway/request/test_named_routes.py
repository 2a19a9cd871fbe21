"""``/v1/messages`` and ``/v1/responses``: planned, hit, and repeated like all others."""

from __future__ import annotations

import json
from typing import Any

import pytest

from common.ids import INPUT_IDS_HEADER, PROMPT_IDS_HEADER, RECORD_HEADER
from common.messages.from_gateway import EnginePlan
from launch.gateway.doors.keys import ApiKey
from launch.gateway.doors.settings import DoorKeys
from launch.gateway.request.parts import CHAT, MESSAGES, RESPONSES
from tests.launch.gateway.client import PROMPT, TEXT, keys_of, post
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

KEYS = DoorKeys(api_keys=(ApiKey("alice", "key-a"),))
SAID = [{"role": "user", "content": PROMPT}]
BODIES: dict[str, dict[str, Any]] = {
    MESSAGES: {"model": "stub", "max_tokens": 3, "messages": SAID},
    RESPONSES: {"input": SAID},
}


@pytest.mark.parametrize("path", BODIES)
async def test_the_engines_say_what_the_prompt_is(path: str) -> None:
    async with cluster_of() as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        status, answer, trace = await post(cluster, path, BODIES[path])
        assert (status, trace["hit_blocks"]) == (200, 3)
        assert TEXT in json.dumps(answer)
        for engine in cluster.engines:
            [body], [plan] = engine.bodies, engine.got(EnginePlan)
            assert body["bootstrap_room"] is not None and "input_ids" not in body
            assert plan.rid == body["rid"] == body["request_id"]


@pytest.mark.parametrize("path", [*BODIES, CHAT])
async def test_a_turn_goes_on_from_the_clients_tokens_and_is_recorded(path: str) -> None:
    ids = [ord(c) for c in PROMPT]
    said = {"model": "stub", "messages": [{"role": "user", "content": "else"}]}
    asked = BODIES[path] | {"input": said["messages"]} if path == RESPONSES else said
    async with cluster_of() as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        recorded = {**asked, "max_tokens": 3, "input_ids": ids, "return_turn_record": True}
        assert (await post(cluster, path, recorded))[2]["hit_blocks"] == 3
        for engine in cluster.engines:
            [body], [asked_for] = engine.bodies, engine.asked_for
            assert body["input_ids"] == ids and "return_turn_record" not in body
            assert asked_for == {RECORD_HEADER} | ({INPUT_IDS_HEADER} if path in BODIES else set())
        status, answer, _ = await post(cluster, path, {**recorded, "input_ids": [-1]})
        assert status == 400 and "integers" in answer["error"]["message"]


@pytest.mark.parametrize("path", [*BODIES, CHAT])
async def test_a_client_may_ask_for_a_prompts_ids_alone(path: str) -> None:
    async with cluster_of() as cluster:
        body = BODIES.get(path) or {"model": "stub", "messages": SAID}
        async with cluster.http.post(path, json=body, headers={PROMPT_IDS_HEADER: "1"}) as answer:
            assert await answer.json() == {"tokens": [ord(c) for c in PROMPT]}
        assert not any(engine.bodies for engine in cluster.engines)


async def test_a_record_is_of_one_answer() -> None:
    async with cluster_of() as cluster:
        body = {"model": "stub", "messages": SAID, "n": 2, "return_turn_record": True}
        status, answer, _ = await post(cluster, CHAT, body)
        assert status == 400 and answer["error"]["param"] == "n"


async def test_what_messages_have_no_place_for_goes_beside_them() -> None:
    async with cluster_of() as cluster:
        salted = {**BODIES[MESSAGES], "cache_salt": "s", "priority": 2}
        await cluster.announce("node-p", keys_of(PROMPT, "s"))
        assert (await post(cluster, MESSAGES, salted))[2]["hit_blocks"] == 3
        [engine, _] = cluster.engines
        [fields] = engine.fields
        rid = engine.bodies[0]["rid"]
        assert json.loads(fields or "") == {"rid": rid, "cache_salt": "s", "priority": 2}


async def test_a_response_has_its_clients_id() -> None:
    async with cluster_of() as cluster:
        _, answer, _ = await post(cluster, RESPONSES, {**BODIES[RESPONSES], "request_id": "mine"})
        assert answer["id"] == "mine"
        _, answer, _ = await post(cluster, RESPONSES, BODIES[RESPONSES])
        assert answer["id"].startswith("resp_")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", BODIES)
async def test_what_an_engine_gave_up_is_tried_again(path: str, stream: bool) -> None:
    async with cluster_of() as cluster:
        unnamed = path == MESSAGES and not stream
        cluster.decodes[0].faults = ["gave up" if unnamed else "abort"]
        status, answer, trace = await post(cluster, path, {**BODIES[path], "stream": stream})
        assert (status, trace["attempts"]) == (200, 2)
        assert "three" in json.dumps(answer) and "load failed" not in json.dumps(answer)


@pytest.mark.parametrize("path", BODIES)
async def test_a_stream_that_breaks_ends_in_a_named_error(path: str) -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].faults = ["break"]
        _, text, _ = await post(cluster, path, {**BODIES[path], "stream": True})
        *_, last = text.rstrip().split("\n\n")
        name, data = last.split("\n")
        error = json.loads(data.removeprefix("data: "))
        assert name == "event: error" and error["type"] == "error"
        assert error["error"]["type"] == "engine_error"


@pytest.mark.parametrize("path", BODIES)
async def test_media_is_refused(path: str) -> None:
    async with cluster_of() as cluster:
        image = {
            "role": "user",
            "content": [{"type": "tool_result", "content": [{"type": "image"}]}],
        }
        field = "messages" if path == MESSAGES else "input"
        status, answer, _ = await post(cluster, path, {**BODIES[path], field: [image]})
        assert status == 400 and "text only" in answer["error"]["message"]
        assert answer["type"] == "error"


async def test_a_key_may_be_sent_as_anthropics_clients_do() -> None:
    async with cluster_of(keys=KEYS) as cluster:
        for key, expected in (("key-a", 200), ("other", 401)):
            headers = {"x-api-key": key}
            async with cluster.http.post(MESSAGES, json=BODIES[MESSAGES], headers=headers) as got:
                assert got.status == expected
