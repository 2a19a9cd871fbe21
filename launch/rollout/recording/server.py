"""The server of all episodes' endpoints: one port, and for each episode a path that nobody else
can guess."""

from __future__ import annotations

import secrets
from types import TracebackType

from aiohttp import web

from common.json import JsonObject
from launch.gateway.request.schema import COUNT_TOKENS
from launch.rollout.recording.conversation import ROUTES
from launch.rollout.recording.passing_client import PassingClient
from launch.rollout.recording.recorder import Recorder, refusal

BODY_BYTES_MAX = 64 << 20
KEY_BYTES = 24
MODELS = "/v1/models"


class RecordingServer:
    """Use as a context; serves at ``url`` then."""

    def __init__(self, client: PassingClient, host: str, model: str) -> None:
        """``host``: an address of this machine, at which agents reach it."""
        self.model = model
        self.url = ""
        self.client = client
        self._host = host
        self._recorders: dict[str, Recorder] = {}
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> RecordingServer:
        """Raises ``OSError``."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        for path in ROUTES:
            app.router.add_post("/{key}" + path, self._record)
        app.router.add_post("/{key}" + COUNT_TOKENS, self._pass)
        app.router.add_get("/{key}" + MODELS, self._models)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, 0).start()
        port = self._runner.addresses[0][1]
        host = f"[{self._host}]" if ":" in self._host else self._host
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    def open(self, recorder: Recorder) -> str:
        """The key of a new episode, whose endpoint is ``url/key``; :meth:`close` it."""
        key = secrets.token_urlsafe(KEY_BYTES)
        self._recorders[key] = recorder
        return key

    def close(self, key: str) -> None:
        """Requests that come now are nobody's."""
        del self._recorders[key]

    def _recorder(self, request: web.Request) -> Recorder | None:
        return self._recorders.get(request.match_info["key"])

    async def _record(self, request: web.Request) -> web.StreamResponse:
        if (recorder := self._recorder(request)) is None:
            return _nobodys()
        path = request.path.removeprefix("/" + request.match_info["key"])
        return await recorder.serve(path, request)

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        if self._recorder(request) is None:
            return _nobodys()
        body: JsonObject = await request.json()
        named = body | {"model": self.model}
        async with self.client.answering(COUNT_TOKENS, named, COUNT_TOKENS) as answer:
            data = await answer.read()
            return web.Response(status=answer.status, body=data, content_type=answer.content_type)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        if self._recorder(request) is None:
            return _nobodys()
        model = {"id": self.model, "object": "model", "created": 0, "owned_by": "rollout"}
        return web.json_response({"object": "list", "data": [model]})


def _nobodys() -> web.Response:
    return refusal(404, "no episode has this URL, or it has ended")
