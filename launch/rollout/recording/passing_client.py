"""The endpoint as a recorder needs it: what a route makes of a request; answers as they come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Mapping

import aiohttp
import msgspec

from common.ids import PROMPT_IDS_HEADER
from common.json import JsonObject
from launch.gateways import NOT_ACTIVE
from launch.rollout.answers import decoded
from launch.rollout.client import (
    CALL_TIMEOUT_S,
    JSON_HEADERS,
    Client,
    Patience,
    Tokens,
    excerpt,
    seconds_of,
)
from launch.rollout.errors import RequestFailed

log = logging.getLogger(__name__)


class PassingClient(Client):
    """A job's client that passes requests of others on, too."""

    async def prompt_ids(self, path: str, body: JsonObject) -> list[int]:
        """Of the prompt that a generating route makes of a body; raises
        :class:`RequestFailed`."""
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT_S)
        asking = JSON_HEADERS | {PROMPT_IDS_HEADER: "1"}
        async with self.answering(path, body, "prompt", asking, timeout) as answer:
            if answer.status != 200:
                raise RequestFailed(excerpt(await answer.read()))
            return decoded(await answer.read(), Tokens).tokens

    @contextlib.asynccontextmanager
    async def answering(
        self,
        path: str,
        body: JsonObject,
        name: str,
        headers: Mapping[str, str] = JSON_HEADERS,
        timeout: aiohttp.ClientTimeout | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer as it begins, whatever it is, of the first gateway that gives one. It is asked
        for again as long as nobody serves; raises :class:`EndpointGone`."""
        patience, data = Patience(self._retry_s), msgspec.json.encode(body)
        while True:
            reason, retry_after_s, is_full = "", 0.0, False
            for url in self._gateways:
                try:
                    answer = await self._http.post(
                        f"{url}{path}", data=data, headers=headers, timeout=timeout or self._timeout
                    )
                except (aiohttp.ClientError, TimeoutError) as error:
                    reason = f"{url}: {error!r}"
                    continue
                async with answer:
                    if answer.status not in (NOT_ACTIVE, 429):
                        self._gateways.answered(url)
                        self._answered_s = time.monotonic()
                        yield answer
                        return
                    is_full |= answer.status == 429
                    retry_after_s = seconds_of(answer.headers.get("retry-after"))
                    reason = f"{url}: HTTP {answer.status}"
            self.full += is_full
            self.retries += not is_full
            pause_s = patience.pause_s(is_full, retry_after_s)
            if pause_s is None:
                raise self._given_up(patience, reason)
            log.info("retry request=%s in_s=%.2f: %s", name, pause_s, reason)
            await asyncio.sleep(pause_s)
