"""A web page must not be able to use the gateway of whoever looks at it.

Three ways are closed. A page's own request (a form, an image, a script) comes with ``Origin`` or
``Sec-Fetch-Site``, or with a body that is no JSON. A page whose name has been made to point to this
machine (DNS rebinding) is of the same origin for the browser: it comes with that name as ``Host``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

from starlette.requests import Request

from launch.gateway.doors.refusals import Forbidden, NotJson
from transfer.ports.source_filter import is_address

READING = ("GET", "HEAD", "OPTIONS")


def is_loopback(host: str | None) -> bool:
    """Whether an address, or a name, is this machine's own way to itself."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def host_of(request: Request) -> str:
    """The name in ``Host``; empty for a client that sends none, which is no browser."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return "?"


def as_sent(origins: Iterable[str]) -> list[str]:
    """As browsers write them."""
    return [origin.lower().rstrip("/") for origin in origins]


class BrowserRules:
    """``bound``: the address that the gateway listens at."""

    def __init__(self, bound: str, hosts: Collection[str], origins: Collection[str]) -> None:
        self._hosts = {host.lower() for host in hosts}
        self._origins = set(as_sent(origins))
        self._names_limited = bool(hosts) or is_loopback(bound)

    def check(self, request: Request, changes_state: bool) -> None:
        """Raises :class:`~launch.gateway.doors.refusals.Refusal`."""
        if self._names_limited and not self.knows(host_of(request)):
            raise Forbidden(
                f"This gateway is not called {host_of(request)!r}: call it by its address or as "
                "localhost, or start it with --allowed-hosts.",
                "host",
            )
        self._check_origin(request)
        if changes_state:
            _check_content_type(request)

    def knows(self, host: str) -> bool:
        """An address needs no name server, so nobody can have made it point here."""
        return not host or host in self._hosts or is_loopback(host) or is_address(host)

    def _check_origin(self, request: Request) -> None:
        origin = request.headers.get("origin", "").lower()
        if origin in self._origins and origin:
            return
        own = request.headers.get("host", "").lower()
        is_foreign = bool(origin) and origin.partition("://")[2] != own
        site = request.headers.get("sec-fetch-site", "none")
        if is_foreign or site not in ("none", "same-origin"):
            raise Forbidden(
                "A page of another origin may not call this gateway: start it with "
                "--allowed-origins to let it.",
                "origin",
            )


def _check_content_type(request: Request) -> None:
    headers = request.headers
    has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if has_body and kind != "application/json" and not kind.endswith("+json"):
        raise NotJson("The body must be JSON, with the header Content-Type: application/json.")
