"""A node's lease at the gateway: it is a member for as long as it renews it.

The gateway may be started anew, or be another one: a lease that it does not know is joined for
again, with the name and the numbers of before. All times are this process's monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
import msgspec

from common.cluster.membership import (
    EXPIRY_S,
    JOIN,
    LEAVE,
    RENEW,
    RENEW_S,
    RESTART,
    Joined,
    JoinRequest,
    LeaveRequest,
    Left,
    NodeMembers,
    Renewal,
    Renewed,
    Restarted,
    RestartRequest,
    State,
)
from common.ids import Incarnation
from launch.access import Access
from launch.gateways import Gateways

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 3.0
JOIN_AGAIN_S = 1.0
Answer = TypeVar("Answer", bound=msgspec.Struct)


class Refused(Exception):
    """The gateway will not have this node; the text says why."""


class Unreachable(Exception):
    """No gateway answers now."""


class _Unknown(Exception):
    """The lease is unknown there."""


class Lease:
    """Of one node. Lives in one asyncio loop; :meth:`close` ends its connections."""

    def __init__(self, urls: Sequence[str], access: Access, request: JoinRequest) -> None:
        self._gateways = Gateways(urls)
        self._access = access
        self._request = request
        # A Service's name leads elsewhere once its Pod is another: it is asked for each time.
        connector = aiohttp.TCPConnector(use_dns_cache=False, force_close=True)
        self._http = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
        )
        self._wake = asyncio.Event()
        self._heard = asyncio.Event()
        self.joined: Joined | None = None
        self.renewed: Renewed | None = None
        """The last answer to a renewal of the state that the node is in."""
        self.wanted = Incarnation(0)
        """The one that the engine's ranks are to run as, by the last answer to a renewal."""
        self.heard_s = -float("inf")
        """When the gateway answered last."""

    async def close(self) -> None:
        await self._http.close()

    async def join(self, timeout_s: float) -> Joined:
        """Ask until a gateway answers. Raises :class:`Refused`, and :class:`Unreachable` after
        ``timeout_s``."""
        give_up_at = time.monotonic() + timeout_s
        name_held_until = time.monotonic() + EXPIRY_S + 2 * RENEW_S
        said = ""
        while True:
            try:
                return await self._join()
            except _NameHeld as error:
                if time.monotonic() > name_held_until:
                    raise Refused(str(error)) from error
                trouble = str(error)
            except Unreachable as error:
                if time.monotonic() > give_up_at:
                    raise
                trouble = str(error)
            if trouble != said:
                log.warning("waiting to join: %s", trouble)
                said = trouble
            await asyncio.sleep(JOIN_AGAIN_S)

    def tell(self, members: NodeMembers) -> None:
        """Where the node's processes are, from the next renewal on, which is at once."""
        self._change(members=members)

    def started(self, incarnation: int, turn: int) -> None:
        """Numbers that a process of the node was given."""
        self._request = msgspec.structs.replace(
            self._request,
            incarnation=max(self._request.incarnation, incarnation),
            turn=max(self._request.turn, turn),
        )

    async def drained(self, timeout_s: float) -> bool:
        """Ask for nothing new, and wait until nothing of the node is needed any more. False:
        ``timeout_s`` have passed, or the gateway has answered nothing for as long as a lease
        lasts."""
        self._change(state=State.DRAINING)
        give_up_at = time.monotonic() + timeout_s
        began = time.monotonic()
        while self.renewed is None or not self.renewed.idle:
            self._heard.clear()
            now = time.monotonic()
            if now > give_up_at or now - max(began, self.heard_s) > EXPIRY_S:
                return False
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard.wait(), min(RENEW_S, give_up_at - now + 0.01))
        return True

    async def keep(self) -> None:
        """Renew for ever; raises :class:`Refused`."""
        is_kept = True
        while True:
            self._wake.clear()
            try:
                await self._renew()
                is_kept = True
            except Unreachable as error:
                if is_kept:
                    log.warning("the lease is not renewed, which is tried on: %s", error)
                is_kept = False
            draining = self._request.state is State.DRAINING
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), RENEW_S / 6 if draining else RENEW_S)

    async def restart(self, ended: int) -> Restarted | None:
        """Numbers for a process that has ended; None: the gateway cannot be asked."""
        if self.joined is None:
            return None
        try:
            return await self._post(RESTART, RestartRequest(self.joined.lease, ended), Restarted)
        except (Unreachable, Refused, _Unknown) as error:
            log.warning("the gateway gives no numbers for a start: %s", error)
            return None

    async def leave(self) -> None:
        """The node's processes have ended."""
        if self.joined is None:
            return
        with contextlib.suppress(Unreachable, Refused, _Unknown):
            await self._post(LEAVE, LeaveRequest(self.joined.lease), Left)

    # ---- requests ---------------------------------------------------------------------

    async def _join(self) -> Joined:
        joined = await self._post(JOIN, self._request, Joined)
        self.joined = joined
        self._request = msgspec.structs.replace(self._request, name=joined.name)
        return joined

    async def _renew(self) -> None:
        assert self.joined is not None, "renewed before joined"
        asked = self._request
        body = Renewal(self.joined.lease, asked.members, asked.state, asked.incarnation)
        try:
            renewed = await self._post(RENEW, body, Renewed)
        except _Unknown:
            log.warning("the gateway does not know the lease: joining again")
            await self.join(EXPIRY_S)
            return
        self.wanted = renewed.incarnation
        if self._request.state is asked.state:
            self.renewed = renewed
        self._request = msgspec.structs.replace(self._request, plan=renewed.plan)
        self._heard.set()

    async def _post(self, path: str, body: msgspec.Struct, answer: type[Answer]) -> Answer:
        """At the first gateway that answers."""
        trouble = "none was asked"
        for url in self._gateways:
            try:
                status, content, again = await self._post_to(url + path, body)
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                trouble = f"{url}: {type(error).__name__} {error}"
                continue
            if status == 200:
                self._gateways.answered(url)
                self.heard_s = time.monotonic()
                return msgspec.json.decode(content, type=answer)
            reason = f"{url}: {_message(content)}"
            if status == 404:
                raise _Unknown(reason)
            if status == 409 and again:
                raise _NameHeld(reason)
            if status in (400, 401, 403, 409):
                raise Refused(reason)
            trouble = f"{status} {reason}"
        raise Unreachable(trouble)

    async def _post_to(self, url: str, body: msgspec.Struct) -> tuple[int, bytes, bool]:
        headers = {"content-type": "application/json", **self._access.headers}
        tls = self._access.tls() if url.startswith("https") else False
        content = msgspec.json.encode(body)
        async with self._http.post(url, data=content, headers=headers, ssl=tls) as response:
            return response.status, await response.read(), "retry-after" in response.headers

    def _change(self, **fields: object) -> None:
        self._request = msgspec.structs.replace(self._request, **fields)
        self.renewed = None
        self._wake.set()


class _NameHeld(Unreachable):
    """By a lease that may run out."""


def new_session() -> str:
    """By which the gateway knows that it is the same node that joins again."""
    return secrets.token_urlsafe(24)


def _message(content: bytes) -> str:
    try:
        return str(msgspec.json.decode(content)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return content[:200].decode(errors="replace")
