"""A client's body, read as far as it is wanted."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from fastapi import Request

from launch.gateway.errors import BadRequest, BodyTooLarge, BodyTooSlow

T = TypeVar("T")

BODY_TIMEOUT_S = 60.0
"""From the headers to the body's last byte."""


async def read_body(request: Request, bytes_max: int) -> bytes:
    """The whole body; raises ``BodyTooLarge``, ``BodyTooSlow`` and ``ClientDisconnect``."""
    declared = request.headers.get("content-length", "")
    size_bytes = int(declared) if declared.isdecimal() else 0
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            if size_bytes <= bytes_max:
                size_bytes = 0
                async for chunk in request.stream():
                    size_bytes += len(chunk)
                    if size_bytes > bytes_max:
                        break
                    chunks.append(chunk)
    except TimeoutError as error:
        raise BodyTooSlow(f"The body did not come within {BODY_TIMEOUT_S:g} s.") from error
    if size_bytes > bytes_max:
        raise BodyTooLarge(f"The body is larger than {bytes_max} bytes (--body-bytes-max).")
    return b"".join(chunks)


def decoded(body: bytes, kind: type[T]) -> T:
    """Of JSON; raises :class:`BadRequest`."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise BadRequest(str(error)) from error
