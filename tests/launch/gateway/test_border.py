"""The gateway is the border: what an engine would die of is refused here, in a clear sentence."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from launch.gateway import body as body_module
from launch.gateway.config import RequestLimits
from launch.gateway.peers import http_probe
from tests.launch.gateway.client import CHAT, GENERATE, post
from tests.launch.gateway.hostile import REFUSED
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

JSON = {"content-type": "application/json"}
SHAPE = {"message", "type", "param", "code"}


async def error_of(cluster: StubCluster, path: str, data: Any) -> tuple[int, dict[str, Any]]:
    async with cluster.http.post(path, data=data, headers=JSON) as answer:
        error = (await answer.json())["error"]
        assert error.keys() == SHAPE and error["code"] == answer.status
        return answer.status, error


async def test_what_would_end_an_engine_never_reaches_it() -> None:
    async with cluster_of() as cluster:
        for field, path, body in REFUSED:
            status, error = await error_of(cluster, path, json.dumps(body))
            assert (status, error["param"]) == (400, field), (body, error)
            assert error["type"] == "invalid_request_error"
        assert not any(engine.bodies for engine in cluster.engines)
        assert (await post(cluster, "/generate", GENERATE))[0] == 200


async def test_a_grammar_that_nothing_meets_is_the_requests_fault() -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].faults = ["grammar"]
        status, error = await error_of(cluster, "/generate", json.dumps(GENERATE))
        assert status == 422 and "Grammar" in error["message"]
        assert len(cluster.decodes[0].bodies) == 1


async def test_fields_that_nobody_knows_stay_here() -> None:
    async with cluster_of() as cluster:
        given = {**CHAT, "never_heard_of": 1, "bootstrap_room": None, "routed_dp_rank": 0}
        assert (await post(cluster, "/v1/chat/completions", given))[0] == 200
        for engine in cluster.engines:
            [got] = engine.bodies
            assert "never_heard_of" not in got and "routed_dp_rank" not in got
            assert got["bootstrap_room"] is not None


async def test_a_prompt_must_fit_the_engines() -> None:
    async with cluster_of() as cluster:
        for body in ({"input_ids": [1] * 4001}, {"text": "a" * 4001}):
            status, error = await error_of(cluster, "/generate", json.dumps(body))
            assert status == 400 and "at most 4000 fit" in error["message"]
        assert (await post(cluster, "/generate", {"input_ids": [1] * 4000}))[0] == 200


async def test_what_is_no_json_object_is_a_bad_request() -> None:
    deep = b"[" * 1000 + b"]" * 1000
    async with cluster_of() as cluster:
        for data in (b"", b"{", b"[1]", b"7", b'{"text": NaN}', b'{"text": ' + deep + b"}"):
            for path in ("/generate", "/v1/tokenize", "/abort_request"):
                assert (await error_of(cluster, path, data))[0] == 400, (path, data)
        unknown = b'{"text": "a", "unknown": ' + deep + b"}"
        assert (await error_of(cluster, "/generate", unknown))[0] == 400


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_large_is_not_read_to_its_end(chunked: bool) -> None:
    async with cluster_of(limits=RequestLimits(body_bytes_max=1000)) as cluster:
        sent = 0

        async def chunks() -> Any:
            nonlocal sent
            for _ in range(1000):
                sent += 100
                yield b" " * 100
                await asyncio.sleep(0)

        data: Any = chunks() if chunked else b" " * 1001
        for path in ("/generate", "/v1/detokenize"):
            assert (await error_of(cluster, path, data))[0] == 413
            if chunked:
                break
        assert sent < 100_000
        body = json.dumps(GENERATE).ljust(1000)
        async with cluster.http.post("/generate", data=body, headers=JSON) as answer:
            assert answer.status == 200


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: Any) -> None:
    monkeypatch.setattr(body_module, "BODY_TIMEOUT_S", 0.1)
    async with cluster_of() as cluster:
        release = asyncio.Event()

        async def stalling() -> Any:
            yield b"{"
            await release.wait()

        assert (await error_of(cluster, "/generate", stalling()))[0] == 408
        release.set()


async def test_every_route_has_one_shape_of_error() -> None:
    async with cluster_of() as cluster:
        for method, path, status in (
            ("GET", "/nothing/here", 404),
            ("DELETE", "/generate", 405),
            ("GET", "/admin/plan/7", 404),
            ("GET", "/admin/plan/" + "7" * 5000, 404),
            ("GET", "/v1/models/../../model_info", 404),
            ("GET", "/v1/models/%252e%252e/%252e%252e/model_info", 404),
            ("GET", "/v1/models/..%0a", 404),
            ("GET", "/v1/models/.%09./.%09./model_info", 404),
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", cluster.config.port)
            writer.write(
                f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = await reader.read()
            begun, _, data = answer.partition(b"\r\n\r\n")
            assert begun.split()[1] == str(status).encode(), path
            assert json.loads(data)["error"].keys() == SHAPE
            writer.close()
        assert [engine.flushed for engine in cluster.engines] == [0, 0]


async def test_probes_share_one_request(caplog: pytest.LogCaptureFixture) -> None:
    async with cluster_of() as cluster:
        cluster.decodes[0].faults = ["hang"]
        probes = [asyncio.create_task(probe(cluster)) for _ in range(20)]
        await cluster.until(lambda: cluster.decodes[0].bodies)
        await asyncio.sleep(0.1)
        assert len(cluster.decodes[0].bodies) == 1
        for task in probes:
            task.cancel()
    assert "walk failed" not in caplog.text  # the gateway ended with the request under way
    async with cluster_of() as cluster:
        assert await asyncio.gather(*(probe(cluster) for _ in range(20))) == [200] * 20
        assert len(cluster.decodes[0].bodies) < 20
        assert await probe(cluster) == 200


async def test_a_probe_that_has_ended_an_engine_condemns_no_later_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(http_probe, "PROBE_S", 0.1)
    async with cluster_of() as cluster:
        engine = cluster.prefills[0]
        engine.dies_of = "max_new_tokens"
        assert await probe(cluster) == 422
        engine.dies_of = ""
        await engine.restart()
        assert await probe(cluster) == 200


async def probe(cluster: StubCluster) -> int:
    async with cluster.http.get("/health_generate") as answer:
        return answer.status


async def test_ids_to_detokenize_are_the_models() -> None:
    async with cluster_of() as cluster:
        for tokens in ([2**30], [[1], [-1]], [1, "2"], "a"):
            data = json.dumps({"tokens": tokens})
            status, error = await error_of(cluster, "/v1/detokenize", data)
            assert (status, error["param"]) == (400, "tokens")
