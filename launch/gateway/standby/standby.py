"""One of several gateways: it follows the active one, takes over from it, and yields to it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable

import aiohttp
import msgspec

from common.cluster.membership import TOKEN_PURPOSE
from launch.access import Access
from launch.gateway.errors import Unavailable
from launch.gateway.services import Services
from launch.gateway.standby.copy import COPY, Copy, CopyRequest, copied, mirror
from launch.gateway.standby.leadership import Standing
from launch.gateway.standby.watch import ASK_S, Peers, Watch, outranks
from transfer.control.keys import derived

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 1.0
HEARD_S = 2.0
"""What a peer has said before is no evidence: it may have died together with the gateway."""
ASK_WHILE_ACTIVE_S = 3.0
"""Two gateways that have not seen each other may both be active."""


class Standby:
    """Of the gateways that the configuration names; with none, this one is active from the start.
    Lives in the gateway's loop."""

    def __init__(self, services: Services, on_superseded: Callable[[], None]) -> None:
        """``on_superseded``: called once everything that was under way has been ended."""
        config = services.config
        self._services = services
        self.leadership = services.leadership
        self.session = secrets.token_hex(16)
        self._urls = [url.rstrip("/") for url in config.standby_of]
        self._access = Access(
            derived(config.control_secret, TOKEN_PURPOSE), config.doors.ssl_ca_certs, any_name=True
        )
        self.watch = Watch(self.session, time.monotonic())
        self._next_plan = 0
        """Of the active one, when it was heard last."""
        self.active_url = ""
        """Where that was."""
        self._on_superseded = on_superseded
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks.append(asyncio.create_task(self._yield()))
        if self._urls:
            self._tasks.append(asyncio.create_task(self._follow()))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def may_take_over(self) -> bool:
        """It seems that no gateway is active."""
        return self.leadership.standing is Standing.STANDBY and self.watch.is_silent()

    def asked_by_node(self) -> None:
        """For what the active gateway gives."""
        self.watch.asked_s = time.monotonic()

    def copy(self) -> Copy:
        """For another gateway."""
        return copied(self._services, self.session)

    # ---- others ask, or this one does -------------------------------------------------

    async def _follow(self) -> None:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        connector = aiohttp.TCPConnector(use_dns_cache=False, force_close=True)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
            while not self.leadership.ended.is_set():
                try:
                    await self._go_round(http)
                except Exception:  # a bug in one of the steps: a standby that gave up would be none
                    log.exception("round failed")
                is_active = self.leadership.is_active
                await asyncio.sleep(ASK_WHILE_ACTIVE_S if is_active else ASK_S)

    async def _go_round(self, http: aiohttp.ClientSession) -> None:
        """Ask all others, once, and act on it."""
        asked_s = time.monotonic()
        answers = await self._ask_all(http)
        if self.leadership.is_active:
            self._look_at(answers)
            return
        leader = self.watch.heard(list(answers.values()), asked_s)
        if leader is not None:
            self._mirror(leader, answers)
        elif self.watch.is_due(list(answers.values()), time.monotonic(), self._peers()):
            self._take_over()

    def _peers(self) -> Peers:
        peers, now = self._services.plane.members.peers(), time.monotonic()
        heard = [peer for peer in peers if now - peer.last_seen_s < HEARD_S]
        return Peers(len(peers), len(heard), sum(peer.led_in > 0 for peer in heard))

    async def _ask_all(self, http: aiohttp.ClientSession) -> dict[str, Copy]:
        """What others answer, by URL."""
        urls = list(self._urls)
        copies = await asyncio.gather(*(self._ask(http, url) for url in urls))
        answers = {url: copy for url, copy in zip(urls, copies, strict=True) if copy is not None}
        for url in [url for url, copy in answers.items() if copy.session == self.session]:
            self._urls.remove(url)  # it is this gateway's own
            del answers[url]
        return answers

    async def _ask(self, http: aiohttp.ClientSession, url: str) -> Copy | None:
        headers = {"content-type": "application/json", **self._access.headers}
        tls = self._access.tls() if url.startswith("https") else False
        body = msgspec.json.encode(CopyRequest(self.session))
        try:
            async with http.post(url + COPY, data=body, headers=headers, ssl=tls) as response:
                content = await response.read()
                if response.status != 200:
                    log.warning("no copy url=%s status=%d %s", url, response.status, content[:200])
                    return None
                return msgspec.json.decode(content, type=Copy)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.debug("no copy url=%s error=%r", url, error)
        except msgspec.DecodeError as error:
            log.warning("no copy url=%s: another version? %s", url, error)
        return None

    # ---- what follows -----------------------------------------------------------------

    def _mirror(self, leader: Copy, answers: dict[str, Copy]) -> None:
        url = next(url for url, copy in answers.items() if copy is leader)
        if url != self.active_url:
            log.info("standby of url=%s term=%d", url, leader.term)
        self.active_url, self._next_plan = url, leader.next_plan
        mirror(self._services, leader)

    def _take_over(self) -> None:
        had_one = self.watch.term > 0
        self.leadership.begin(max(self.watch.term, self._next_plan))
        self.leadership.takeovers_total += had_one
        services = self._services
        services.registry.mirror(list(services.registry.nodes.values()))
        services.plane.known.begin()
        services.plane.changed.set()
        log.warning("active now term=%d after=%s", self.leadership.term, self.active_url or "-")

    def _look_at(self, answers: dict[str, Copy]) -> None:
        """While active: is another one, too?"""
        term, has_nodes = self.leadership.term, bool(self._services.registry.nodes)
        for url, copy in answers.items():
            if outranks(copy, term, has_nodes):
                log.error("another gateway is active: url=%s term=%d own=%d", url, copy.term, term)
                self.active_url = url
                self.leadership.step_down()

    async def _yield(self) -> None:
        """Once superseded: end what is under way, and the process."""
        await self.leadership.ended.wait()
        services = self._services
        for walk in list(services.walks.values()):
            walk.fail(Unavailable("another gateway has taken over", retry_after_s=1))
        log.error("superseded: this gateway has ended what was under way")
        self._on_superseded()
