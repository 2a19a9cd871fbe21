"""A client's HTTP request: admission, parts, and the answer put together from their walks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from common.ids import PROMPT_IDS_HEADER
from common.tracing.spans import NO_SPAN, OK, Span
from launch.gateway.admission import Client, Seat
from launch.gateway.body import read_body
from launch.gateway.doors.salts import salted
from launch.gateway.doors.visitor import authorization_of, visitor_of
from launch.gateway.errors import FAULTS, BadRequest, GatewayError, RequestTimeout, Unavailable
from launch.gateway.request.answer import CHUNKS_MAX
from launch.gateway.request.cancel_scope import CancelScope
from launch.gateway.request.checks import check_limits, check_part
from launch.gateway.request.merge_answers import EngineAnswer, StreamMerger, merge_answers
from launch.gateway.request.parts import GENERATE, Part, PartedRequest, split_request
from launch.gateway.request.prompt import tokenize
from launch.gateway.request.schema import decode_body
from launch.gateway.request.trace import Trace
from launch.gateway.request.walk import RequestWalk
from launch.gateway.services import Services

GONE_POLL_S = 0.25
"""How often a waiting request looks whether its client is still there."""
CLIENT_GONE_STATUS = 499
"""Nobody reads it; it keeps the access log honest."""

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection."""


async def serve(services: Services, path: str, request: Request) -> Response:
    """Answer one of the three generating endpoints."""
    begun_s = time.monotonic()
    span = services.tracer.request(f"POST {path}", request.headers)
    try:
        limits = services.config.limits
        body = decode_body(path, await read_body(request, limits.body_bytes_max))
        check_limits(body, limits)
        visitor = visitor_of(request)
        client = Client.of(body, visitor.tenant, authorization_of(request))
        if (salt_key := services.salt_keys.get(visitor.tenant)) is not None:
            body = salted(body, salt_key)
        parted = split_request(path, body, services.config.requests_max)
        if PROMPT_IDS_HEADER in request.headers:
            return await _prompt_ids(services, parted)
        seat = _admit(services, parted, client)
    except GatewayError as error:
        services.metrics.requests.labels(path, error.outcome).inc()
        span.end(error.outcome, is_error=error.outcome in FAULTS)
        return error_response(error)
    for part in parted.parts:
        part.span = span
    tokenized = asyncio.ensure_future(_tokenize(services, parted))
    walks = [_walk(services, part, seat, begun_s, tokenized) for part in parted.parts]
    if span is not NO_SPAN:
        _end_with(walks, span)
    streaming = False
    try:
        response = await _until_gone(request, _answer(parted, walks))
        streaming = isinstance(response, StreamingResponse)
        return response
    except GatewayError as error:
        return error_response(error, walks[0].trace)
    except ClientGone:
        return Response(status_code=CLIENT_GONE_STATUS)
    except asyncio.CancelledError:  # by uvicorn: the gateway ends, and has waited long enough
        return error_response(Unavailable("the gateway is stopping"), walks[0].trace)
    finally:
        if not streaming:
            _cancel(walks)
            tokenized.cancel()


def error_response(error: GatewayError, trace: Trace | None = None) -> Response:
    headers = error.headers()
    if trace is not None and trace.attempts:
        headers |= trace.header(1)
    return Response(error.body(), error.status, headers=headers, media_type=error.content_type)


async def _prompt_ids(services: Services, parted: PartedRequest) -> Response:
    """What a request would be planned by, and nothing else."""
    await _tokenize(services, parted)
    ids = {"tokens": parted.parts[0].token_ids}
    return Response(msgspec.json.encode(ids), media_type="application/json")


async def _tokenize(services: Services, parted: PartedRequest) -> None:
    """Token ids of every part, which the model has and which fit it; as soon as any engine lives
    that can be asked."""
    limit_s, members = services.config.request_timeout_s, services.plane.members
    begun_s = time.monotonic()
    has_waited = False
    async with CancelScope(limit_s, RequestTimeout(f"no tokens within {limit_s:g} s")) as scope:
        with services.outage.bounded(scope):
            while not await _tokenized(services, parted):
                has_waited = True
                await services.outage.wait("no engine is alive")
            if has_waited and not members.troubles():
                services.outage.over()
    parted.parts[0].span.note("tokenize", begun_s)
    bounds = members.bounds()
    assert bounds is not None
    for part in parted.parts[:: parted.samples]:
        check_part(part, bounds)


async def _tokenized(services: Services, parted: PartedRequest) -> bool:
    """False if no engine was there to be asked."""
    members = services.plane.members
    if members.bounds() is None or not members.live_engines():
        return False
    try:
        await tokenize(parted, services.client)
    except Unavailable:
        return False
    return True


def _admit(services: Services, parted: PartedRequest, client: Client) -> Seat:
    rids = [part.rid for part in parted.parts]
    walks = services.walks
    taken = sorted({rid for rid in rids if (client.tenant, rid) in walks or rids.count(rid) > 1})
    if taken:
        raise BadRequest(f"Duplicate request ID: {', '.join(taken)}")
    count = len(parted.parts)
    return services.admission.admit(client.tenant, count, client.owner, client.user)


def _walk(
    services: Services, part: Part, seat: Seat, begun_s: float, tokenized: asyncio.Future[None]
) -> RequestWalk:
    walk = RequestWalk(services, part, seat, begun_s, tokenized)
    services.walks[seat.tenant, part.rid] = walk

    def ended(_: asyncio.Task[None]) -> None:
        del services.walks[seat.tenant, part.rid]
        services.admission.leave(seat)

    walk.task.add_done_callback(ended)
    return walk


def _end_with(walks: Sequence[RequestWalk], span: Span) -> None:
    """The request's span ends with its last part."""

    def ended(_: asyncio.Future[list[BaseException | None]]) -> None:
        outcomes = [walk.outcome for walk in walks]
        outcome = next((outcome for outcome in outcomes if outcome != OK), OK)
        span.set(
            {
                "parts": len(walks),
                "request_id": walks[0].part.request_rid or walks[0].part.rid,
                "prompt_tokens": sum(len(walk.part.token_ids or ()) for walk in walks),
            }
        )
        span.end(outcome, is_error=outcome in FAULTS)

    everything = asyncio.gather(*(walk.task for walk in walks), return_exceptions=True)
    everything.add_done_callback(ended)


def _cancel(walks: Sequence[RequestWalk]) -> None:
    for walk in walks:
        walk.cancel()


async def _until_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client has gone."""
    task = asyncio.ensure_future(work)
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=GONE_POLL_S)
            if done:
                return task.result()
            if await request.is_disconnected():
                raise ClientGone
    finally:
        task.cancel()


async def _answer(parted: PartedRequest, walks: list[RequestWalk]) -> Response:
    """The response, once it is known how it begins."""
    if not walks[0].part.stream:
        return await _whole_answer(parted, walks)
    await asyncio.wait([w.answer.head for w in walks], return_when=asyncio.FIRST_COMPLETED)
    first = next(w for w in walks if w.answer.opened)
    head = first.answer.head.result()
    if not parted.merged:
        body = first.answer.chunks()
    else:
        body = _merged_stream(parted, walks)
    return StreamingResponse(
        _cancelling(body, walks),
        head.status,
        headers=first.trace.header(len(walks)),
        media_type=head.content_type,
    )


async def _whole_answer(parted: PartedRequest, walks: list[RequestWalk]) -> Response:
    heads = await asyncio.gather(*(w.answer.head for w in walks))
    bodies = [b"".join([chunk async for chunk in w.answer.chunks()]) for w in walks]
    content = bodies[0]
    if parted.merged:
        answers: list[EngineAnswer] = [msgspec.json.decode(body) for body in bodies]
        listed = parted.path == GENERATE
        merged = answers if listed else merge_answers(parted.rid, answers, parted.samples)
        content = msgspec.json.encode(merged)
    headers = walks[0].trace.header(len(walks))
    return Response(content, heads[0].status, headers=headers, media_type=heads[0].content_type)


async def _cancelling(
    chunks: AsyncIterator[bytes], walks: Sequence[RequestWalk]
) -> AsyncIterator[bytes]:
    """``chunks``; its end, or the client's, ends the walks."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        _cancel(walks)


async def _merged_stream(
    parted: PartedRequest, walks: Sequence[RequestWalk]
) -> AsyncIterator[bytes]:
    merger = StreamMerger(parted.path, parted.rid, len(walks), parted.samples)
    queue: asyncio.Queue[tuple[int, bytes | None]] = asyncio.Queue(CHUNKS_MAX)
    pumps = [asyncio.create_task(_pump(i, walk, queue)) for i, walk in enumerate(walks)]
    running = len(walks)
    try:
        while running:
            index, chunk = await queue.get()
            if chunk is None:
                running -= 1
                continue
            merged = b"".join(merger.take(index, event) for event in _split(chunk))
            if merged:
                yield merged
        yield merger.finish()
    finally:
        for pump in pumps:
            pump.cancel()


async def _pump(
    index: int, walk: RequestWalk, queue: asyncio.Queue[tuple[int, bytes | None]]
) -> None:
    try:
        await walk.answer.head
        async for chunk in walk.answer.chunks():
            await queue.put((index, chunk))
    except GatewayError as error:
        await queue.put((index, error.event()))
    await queue.put((index, None))


def _split(chunk: bytes) -> list[bytes]:
    return [event + b"\n\n" for event in chunk.split(b"\n\n") if event]
