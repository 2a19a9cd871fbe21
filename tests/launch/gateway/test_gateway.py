"""The whole gateway, in front of stub engines and agents."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import msgspec
import pytest

from common.ids import Incarnation
from common.messages.codec import PROTOCOL
from common.messages.from_engines import PlanRefused
from common.messages.from_gateway import EndPlan, EnginePlan, ReadShare, ReleasePlan, Subscribe
from launch.gateway.peers import control_plane
from tests.launch.gateway.client import (
    CHAT,
    GENERATE,
    PROMPT,
    TEXT,
    content_of,
    keys_of,
    metric,
    post,
    stream_of,
)
from tests.launch.gateway.request.stub_answers import PREFILL_LOGPROBS, WORDS
from tests.launch.gateway.stubs import NAMESPACE
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]


async def test_hits_travel_and_the_trace_says_so() -> None:
    async with cluster_of(path_policy="decode") as cluster:
        agent = cluster.agents["node-d"]
        await cluster.announce(agent.name, keys_of(PROMPT)[:2])
        status, answer, trace = await post(cluster, "/v1/chat/completions", CHAT)
        assert status == 200
        assert answer["choices"][0]["message"]["content"] == TEXT
        assert (trace["prefill"], trace["decode"], trace["attempts"]) == ("p0", "d0", 1)
        assert (trace["hit_blocks"], trace["recomputed_tokens"]) == (2, 5)
        read_bytes = {"ssd": 2 * NAMESPACE.layout.block_bytes}
        assert trace["readers"] == {"node-d": {"blocks": 2, "read_bytes": read_bytes}}
        assert {"tokenize", "queue", "read", "plan", "first_byte"} <= trace["timings_s"].keys()
        [share] = agent.got(ReadShare)
        for engine in cluster.engines:
            [plan] = engine.got(EnginePlan)
            assert plan.keys == share.keys == keys_of(PROMPT)[:2]
            assert [plan.agents[r] for r in plan.reader] == ["node-d", "node-d"]
            await cluster.until(lambda engine=engine: engine.got(EndPlan))
        await cluster.until(lambda: agent.got(ReleasePlan))
        prefill, decode = cluster.prefills[0].bodies[0], cluster.decodes[0].bodies[0]
        assert prefill == decode
        assert prefill["input_ids"] == [ord(c) for c in PROMPT]
        assert prefill["bootstrap_port"] == 8998 and prefill["messages"] == CHAT["messages"]
        assert await metric(cluster, "dualpath:hit_tokens_total") == 8
        assert await metric(cluster, "dualpath:recomputed_tokens_total") == 5
        read = 'dualpath:agent_storage_read_bytes_total{agent="node-d",tier="ssd"}'
        assert await metric(cluster, read) == 5
        waited = 'engine_kv_wait_seconds_total{engine="p0",layer="0"}'
        assert await metric(cluster, f"dualpath:{waited}") == 2


async def test_tenants_with_other_salts_miss() -> None:
    async with cluster_of() as cluster:
        await cluster.announce("node-p", keys_of(PROMPT, cache_salt="a"))
        for salt, hit_blocks in (("a", 3), ("b", 0), ("", 0)):
            body = {"prompt": PROMPT, "cache_salt": salt}
            assert (await post(cluster, "/v1/completions", body))[2]["hit_blocks"] == hit_blocks


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
async def test_a_request_may_read_nothing_and_keep_nothing(path: str) -> None:
    async with cluster_of() as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        given = {"prompt": PROMPT} if path != "/generate" else GENERATE
        for fields, hit_blocks in (({}, 3), ({"no_load": True, "no_store": True}, 0)):
            status, _, trace = await post(cluster, path, {**given, **fields})
            assert (status, trace["hit_blocks"]) == (200, hit_blocks)
            for engine in cluster.engines:
                assert engine.got(EnginePlan)[-1].no_store == bool(fields)
                assert not engine.bodies[-1].keys() & {"no_load", "no_store"}


async def test_streams_are_passed_on() -> None:
    async with cluster_of() as cluster:
        body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "rid": "mine"}
        status, text, trace = await post(cluster, "/v1/chat/completions", body)
        events = stream_of(text)
        assert status == 200 and trace["attempts"] == 1
        assert content_of(events) == TEXT and events[-1] == "[DONE]"
        assert {e["id"] for e in events[:-1]} == {"mine"}
        assert events[-2]["usage"]["prompt_tokens"] == len(PROMPT)


async def test_samples_and_prompts_fan_out() -> None:
    async with cluster_of() as cluster:
        body = {**CHAT, "n": 3, "rid": "mine", "seed": 5}
        _, answer, trace = await post(cluster, "/v1/chat/completions", body)
        assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
        assert answer["id"] == "mine" and trace["parts"] == 3
        assert answer["usage"]["prompt_tokens"] == len(PROMPT)
        assert answer["usage"]["completion_tokens"] == 3 * len(WORDS)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 4
        bodies = cluster.decodes[0].bodies
        assert len({b["bootstrap_room"] for b in bodies}) == len({b["rid"] for b in bodies}) == 3
        assert all("n" not in b and b["seed"] == 5 for b in bodies)

        usage = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"prompt": ["abcd", "efghij"], "n": 2, **usage}
        _, text, _ = await post(cluster, "/v1/completions", body)
        events = stream_of(text)
        assert [content_of(events, i) for i in range(4)] == [TEXT] * 4
        assert events[-1] == "[DONE]" and events.count("[DONE]") == 1
        assert events[-2]["usage"]["prompt_tokens"] == 10
        assert events[-2]["usage"]["completion_tokens"] == 4 * len(WORDS)

        params = [{"max_new_tokens": 1}, {"max_new_tokens": 2}]
        body = {"input_ids": [[1, 2, 3], [4, 5]], "sampling_params": params}
        _, answer, _ = await post(cluster, "/generate", body)
        assert [a["text"] for a in answer] == [TEXT, TEXT]
        last = {tuple(b["input_ids"]): b["sampling_params"] for b in cluster.decodes[0].bodies[-2:]}
        assert last == {(1, 2, 3): params[0], (4, 5): params[1]}


async def test_prefill_logprobs_join_the_answer() -> None:
    async with cluster_of() as cluster:
        body = {**GENERATE, "return_logprob": True, "logprob_start_len": 0}
        _, answer, _ = await post(cluster, "/generate", body)
        assert answer["meta_info"]["input_token_logprobs"] == PREFILL_LOGPROBS


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["500", "close", "abort"])
@pytest.mark.parametrize("side", ["prefill", "decode"])
async def test_a_failed_attempt_is_repeated_without_the_cache(
    side: str, fault: str, stream: bool
) -> None:
    async with cluster_of(prefills=2, decodes=2) as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        failing = cluster.prefills if side == "prefill" else cluster.decodes
        failing[0].faults = [fault]
        body = {**CHAT, "stream": stream}
        status, answer, trace = await post(cluster, "/v1/chat/completions", body)
        assert status == 200
        text = content_of(stream_of(answer)) if stream else None
        assert (text or answer["choices"][0]["message"]["content"]) == TEXT
        assert (trace["attempts"], trace["hit_blocks"]) == (2, 0)
        # Its error does not tell which of the two failed, so the spare ones take over.
        spare = (cluster.prefills[1].name, cluster.decodes[1].name)
        assert (trace["prefill"], trace["decode"]) == spare
        first = failing[0].bodies[0]["rid"]
        for engine in cluster.engines:
            if any(b["rid"] == first for b in engine.bodies):
                await cluster.until(lambda engine=engine: first in engine.aborted)
        await cluster.until(lambda: cluster.agents["node-p"].got(ReleasePlan))
        assert await metric(cluster, "dualpath:retries_total") == 1


async def test_an_engine_that_falls_silent_is_left_for_a_spare_one() -> None:
    async with cluster_of(prefills=2, heartbeat_timeout_s=3.0) as cluster:
        cluster.prefills[0].faults = ["hang"]
        request = asyncio.create_task(post(cluster, "/generate", GENERATE))
        await cluster.until(lambda: cluster.prefills[0].bodies)
        cluster.prefills[0].silent = True
        status, _, trace = await request
        assert status == 200
        assert (trace["prefill"], trace["attempts"]) == (cluster.prefills[1].name, 2)


async def test_without_a_spare_engine_the_error_is_clear_and_soon() -> None:
    async with cluster_of(heartbeat_timeout_s=3.0, engine_wait_s=0.3) as cluster:
        cluster.decodes[0].faults = ["hang"]
        request = asyncio.create_task(post(cluster, "/generate", GENERATE))
        await cluster.until(lambda: cluster.decodes[0].bodies)
        cluster.decodes[0].silent = True
        begun = time.monotonic()
        status, answer, _ = await request
        assert status == 503 and "decode" in answer["error"]["message"]
        assert time.monotonic() - begun < 10
        status, answer, _ = await post(cluster, "/generate", GENERATE)
        assert status == 503
        async with cluster.http.get("/health") as health:
            assert health.status == 503
            assert (await health.json())["reasons"] == ["no live decode engine"]


async def test_after_the_first_token_the_stream_ends_with_an_error() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].break_after_words = 1
        cluster.decodes[0].word_delay_s = 0.05
        status, text, _ = await post(cluster, "/v1/chat/completions", {**CHAT, "stream": True})
        events = stream_of(text)
        assert status == 200 and content_of(events) == WORDS[0]
        assert events[-1]["error"]["code"] == 502
        assert len(cluster.decodes[0].bodies) == 1


async def test_refusals_of_sglang_are_passed_on() -> None:
    async with cluster_of() as cluster:
        status, answer, _ = await post(cluster, "/v1/chat/completions", {"messages": []})
        assert (status, answer["error"]["message"]) == (400, "Messages cannot be empty.")
        cluster.prefills[0].faults = ["400"]
        cluster.decodes[0].faults = ["hang"]
        status, answer, _ = await post(cluster, "/generate", GENERATE)
        assert (status, answer["error"]["message"]) == (400, "fault 400")
        assert len(cluster.prefills[0].bodies) == 1
        for ids in ([-1], [2**40], [1.5], [1, "a"]):
            status, answer, _ = await post(cluster, "/generate", {"input_ids": [1, *ids]})
            assert status == 400 and answer["error"]["param"] == "input_ids"
        image = {"type": "image_url", "image_url": {"url": "data:x"}}
        body = {"messages": [{"role": "user", "content": [image]}]}
        status, answer, _ = await post(cluster, "/v1/chat/completions", body)
        assert status == 400 and "text only" in answer["error"]["message"]


async def test_the_bound_on_requests_in_flight() -> None:
    async with cluster_of(requests_max=2) as cluster:
        cluster.decodes[0].word_delay_s = 0.3
        body = {**CHAT, "stream": True}
        held = [asyncio.create_task(post(cluster, "/v1/chat/completions", body)) for _ in range(2)]
        await cluster.until(lambda: cluster.services.admission.admitted == 2)
        async with cluster.http.post("/v1/chat/completions", json=CHAT) as answer:
            assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1
            assert (await answer.json())["error"]["type"] == "rate_limit_error"
        assert [status for status, _, _ in await asyncio.gather(*held)] == [200, 200]
        assert (await post(cluster, "/v1/chat/completions", CHAT))[0] == 200
        status, answer, _ = await post(cluster, "/v1/chat/completions", {**CHAT, "n": 3})
        assert status == 400


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_aborted_everywhere(stream: bool) -> None:
    async with cluster_of() as cluster:
        await cluster.announce("node-p", keys_of(PROMPT))
        cluster.decodes[0].word_delay_s = 30
        if not stream:
            cluster.decodes[0].faults = ["hang"]
        body = {**CHAT, "stream": stream, "rid": "mine"}
        request = asyncio.create_task(post(cluster, "/v1/chat/completions", body))
        await cluster.until(lambda: cluster.decodes[0].bodies)
        await asyncio.sleep(0.2)
        request.cancel()
        await cluster.until(lambda: all(e.aborted == [e.bodies[0]["rid"]] for e in cluster.engines))
        await cluster.until(lambda: all(engine.got(EndPlan) for engine in cluster.engines))
        await cluster.until(lambda: cluster.agents["node-p"].got(ReleasePlan))
        await cluster.until(lambda: cluster.services.admission.admitted == 0)


async def test_abort_request_reaches_the_engines() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].word_delay_s = 0.5
        body = {**CHAT, "stream": True, "rid": "mine"}
        request = asyncio.create_task(post(cluster, "/v1/chat/completions", body))
        await cluster.until(lambda: cluster.decodes[0].bodies)
        async with cluster.http.post("/abort_request", json={"rid": "mine"}) as answer:
            assert answer.status == 200
        assert all(e.aborted == [e.bodies[0]["rid"]] for e in cluster.engines)
        assert (await request)[2]["attempts"] == 1


async def test_blocks_that_do_not_come_are_recomputed() -> None:
    async with cluster_of(read_timeout_s=0.3, path_policy="prefill") as cluster:
        agent = cluster.agents["node-p"]
        await cluster.announce(agent.name, keys_of(PROMPT))
        agent.lost = {keys_of(PROMPT)[1]}
        _, _, trace = await post(cluster, "/generate", GENERATE)
        assert (trace["hit_blocks"], trace["attempts"]) == (1, 1)
        agent.slow = True
        _, _, trace = await post(cluster, "/generate", GENERATE)
        assert (trace["hit_blocks"], trace["attempts"]) == (0, 1)
        assert cluster.prefills[0].got(EnginePlan)[-1].keys == []
        await cluster.until(lambda: agent.got(ReleasePlan))


async def test_a_reader_that_restarts_is_not_waited_for() -> None:
    async with cluster_of(path_policy="prefill") as cluster:
        agent = cluster.agents["node-p"]
        await cluster.announce(agent.name, keys_of(PROMPT))
        agent.slow = True
        request = asyncio.create_task(post(cluster, "/generate", GENERATE))
        await cluster.until(lambda: agent.got(ReadShare))
        agent.incarnation = Incarnation(agent.incarnation + 1000)
        agent.held = []
        _, _, trace = await request
        assert trace["hit_blocks"] == 0 and trace["timings_s"]["read"] < 5
        await cluster.until(lambda: len(agent.got(Subscribe)) == 2)
        assert len(cluster.services.scheduler.directory) == 0


async def test_a_gap_in_the_announcements_is_healed() -> None:
    async with cluster_of() as cluster:
        agent = cluster.agents["node-d"]
        cluster.services.plane.members.agents["node-d"].snapshot_asked_s = -1000.0
        agent.held = keys_of(PROMPT)
        agent.sequence += 1  # one was lost
        await agent.push(agent.announcement([], snapshot=False))
        await cluster.until(lambda: len(cluster.services.scheduler.directory) == 3)
        assert len(agent.got(Subscribe)) == 2


async def test_malformed_messages_are_counted_and_dropped() -> None:
    async with cluster_of() as cluster:
        await cluster.agents["node-d"].push_raw(b"DP0rubbish")
        await cluster.decodes[0].push_raw(PROTOCOL + b"\xff")
        name = "dualpath:malformed_messages_total"
        members = cluster.services.plane.members
        peers = [members.engines["d0"], members.agents["node-d"]]
        await cluster.until(lambda: [peer.malformed_total for peer in peers] == [1, 1])
        assert await metric(cluster, f'{name}{{agent="node-d"}}') == 1
        assert (await post(cluster, "/generate", GENERATE))[0] == 200


async def test_engines_of_another_namespace_are_not_paired() -> None:
    async with cluster_of(decodes=2, engine_wait_s=0.1) as cluster:
        other = msgspec.structs.replace(NAMESPACE, weight_version="2")
        first, second = cluster.decodes
        peers = cluster.services.plane.members.engines
        first.namespace = other
        await cluster.until(lambda: peers[first.name].hello.namespace == other)
        for _ in range(3):
            _, _, trace = await post(cluster, "/generate", GENERATE)
            assert trace["decode"] == second.name
        second.namespace = other
        await cluster.until(lambda: peers[second.name].hello.namespace == other)
        status, body, _ = await post(cluster, "/generate", GENERATE)
        assert status == 503 and "they differ in weight_version" in str(body)
        settings = '{"dtype": "float32", "quantization": "fp8"}'
        for decode in (first, second):
            decode.namespace = msgspec.structs.replace(NAMESPACE, settings=settings)
        await cluster.until(
            lambda: all(peers[d.name].hello.namespace.settings for d in (first, second))
        )
        troubles = cluster.services.plane.members.troubles()
        assert troubles[0].endswith("they differ in dtype, quantization")
        for decode in (first, second):
            decode.namespace = msgspec.structs.replace(NAMESPACE, kv_dtype="float8_e5m2")
        await cluster.until(
            lambda: all(
                peers[d.name].hello.namespace.kv_dtype == "float8_e5m2" for d in (first, second)
            )
        )
        troubles = cluster.services.plane.members.troubles()
        assert re.search(r"kv_dtype \(\w+ of \d+ bytes a block, float8_e5m2 of", troubles[0])


async def test_a_request_planned_for_weights_that_were_just_updated_is_planned_again(monkeypatch):
    async with cluster_of() as cluster:
        assert (await post(cluster, "/generate", GENERATE))[0] == 200
        monkeypatch.setattr(control_plane, "PING_S", 60.0)  # nobody tells the gateway
        updated = msgspec.structs.replace(NAMESPACE, weight_version="2")
        for engine in cluster.engines:
            engine.namespace = updated
        status, _, trace = await post(cluster, "/generate", GENERATE)
        assert (status, trace["attempts"]) == (200, 2)
        for engine in cluster.engines:
            assert engine.got(EnginePlan)[-1].namespace_digest == updated.digest()
            assert len(engine.bodies) == 2  # no request reached an engine of other weights


@pytest.mark.parametrize(("updates", "status"), [(8, 200), (9, 200), (10, 502)])
async def test_a_request_outlasts_several_updates_of_weights(updates: int, status: int) -> None:
    """What they do to it is no failure of its own, of which it may have one."""
    async with cluster_of() as cluster:
        (engine,) = cluster.decodes
        answers, refused = engine.answers, []

        def refuse(message: Any) -> list[Any]:
            if not isinstance(message, EnginePlan) or len(refused) == updates:
                return answers(message)
            refused.append(message.id)
            return [engine.hello(), PlanRefused(message.id, "other weights", stale=True)]

        engine.answers = refuse  # type: ignore[method-assign]
        said, _, trace = await post(cluster, "/generate", GENERATE)
        assert said == status and trace["attempts"] == len(set(refused)) + (status == 200)


@pytest.mark.parametrize("body", [GENERATE, {**GENERATE, "stream": True}])
async def test_an_update_after_the_plan_was_taken_is_no_failure_either(body: dict) -> None:
    async with cluster_of() as cluster:
        (engine,) = cluster.prefills
        engine.faults = ["outdated", "500", "outdated"]
        status, _, trace = await post(cluster, "/generate", body)
        assert (status, trace["attempts"]) == (200, 4)


async def test_requests_name_the_attention_groups_of_their_engines() -> None:
    async with cluster_of() as cluster:
        for name, group in (("p0", 3), ("d0", None)):
            peer = cluster.services.plane.members.engines[name]
            peer.address = msgspec.structs.replace(peer.address, group=group)
        status, _, _ = await post(cluster, "/v1/chat/completions", CHAT)
        assert status == 200
        prefill, decode = cluster.prefills[0].bodies[0], cluster.decodes[0].bodies[0]
        assert prefill["routed_dp_rank"] == prefill["disagg_prefill_dp_rank"] == 3
        assert decode["disagg_prefill_dp_rank"] == 3 and "routed_dp_rank" not in decode
