"""Who a request is from, as the doors have found."""

from __future__ import annotations

import msgspec
from starlette.requests import Request


class Visitor(msgspec.Struct, frozen=True):
    """Of one request."""

    tenant: str = ""
    """Of its API key; empty where there are none."""
    is_operator: bool = False


def visitor_of(request: Request) -> Visitor:
    """Known to every route."""
    visitor: Visitor = request.state.visitor
    return visitor


def authorization_of(request: Request) -> str | None:
    """The header ``Authorization``; Anthropic's clients send their key as ``x-api-key``."""
    key = request.headers.get("x-api-key")
    return request.headers.get("authorization") or (f"Bearer {key}" if key else None)
