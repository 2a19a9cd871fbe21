"""A client that does not read loses its seat and its connection in bounded time."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from launch.gateway.errors import ClientStalled
from launch.gateway.request.answer import CHUNKS_MAX, Answer
from tests.launch.gateway.client import GENERATE, metric, post
from tests.launch.gateway.stubs import StubCluster
from tests.launch.gateway.stubs import running_cluster as cluster_of

pytestmark = [pytest.mark.asyncio, pytest.mark.timeout(60)]

FLOOD = ["word " * 40_000] * 400
"""More than any buffer between an engine and a client holds."""


ENDED = 'dualpath:requests_total{endpoint="/v1/completions",outcome="%s"}'


def ask_without_reading(
    cluster: StubCluster, path: str, fields: dict[str, object]
) -> socket.socket:
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", cluster.config.port))
    body = json.dumps({**fields, "stream": True})
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


@pytest.mark.parametrize(
    ("samples", "bounds"),
    [(2, {"client_stall_s": 0.4}), (1, {"client_stall_s": 0.9, "request_timeout_s": 0.5})],
)
async def test_who_does_not_read_is_cut_off_and_its_seat_free(samples, bounds) -> None:
    async with cluster_of(requests_max=2, **bounds) as cluster:
        cluster.decodes[0].words = FLOOD
        asked = {"model": "stub", "prompt": "a", "n": samples}
        client = ask_without_reading(cluster, "/v1/completions", asked)
        await cluster.until(lambda: cluster.services.admission.admitted == samples)
        await cluster.until(lambda: cluster.services.admission.admitted == 0)
        # Where the kernel is first, the client is gone.
        ends = ("failed",) if "request_timeout_s" in bounds else ("client_stalled", "client_gone")
        assert samples == sum([await metric(cluster, ENDED % outcome) for outcome in ends])
        await cluster.until(lambda: cluster.decodes[0].aborted)
        await cluster.until(lambda: not cluster.services.walks)
        # The kernel gives the connection up, though the client has not closed it.
        await cluster.until(lambda: not cluster.connections())
        client.close()
        cluster.decodes[0].words = ["one"]
        assert (await post(cluster, "/generate", GENERATE))[0] == 200


async def test_a_slow_reader_gets_all_of_it() -> None:
    answer = Answer(stream=True, stall_s=5.0)
    answer.open(200, "text/event-stream")

    async def write() -> None:
        for number in range(3 * CHUNKS_MAX):
            await answer.write(b"%d " % number)
        answer.close()

    writing = asyncio.create_task(write())
    await asyncio.sleep(0)
    assert not writing.done()
    chunks = [chunk async for chunk in answer.chunks()]
    assert chunks == [b"%d " % number for number in range(3 * CHUNKS_MAX)]


async def test_the_end_of_an_answer_waits_for_nobody() -> None:
    answer = Answer(stream=True, stall_s=0.01)
    answer.open(200, "text/event-stream")
    for _ in range(CHUNKS_MAX):
        await answer.write(b"x")
    with pytest.raises(ClientStalled) as stalled:
        await answer.write(b"y")
    answer.close(stalled.value)
    chunks = [chunk async for chunk in answer.chunks()]
    assert chunks[:-1] == [b"x"] * CHUNKS_MAX and b"nothing was read" in chunks[-1]
