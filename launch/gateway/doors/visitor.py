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
