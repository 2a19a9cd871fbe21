"""In which pages of the KV pool a request's tokens are."""

from __future__ import annotations

import msgspec
import torch

from engine.sglang.views import Request
from engine.streams import HostPages, Streams


class Window(msgspec.Struct, frozen=True, eq=False):
    """Of the layers whose tokens attend to the last ones alone, in a pool of their own."""

    rows: torch.Tensor
    """Rows of that pool by rows of the KV pool, changing; 0: the token has none there."""
    tokens: int
    """Before it, to which a token attends."""


class PageTable:
    """SGLang's table by rows ([requests, positions], changing), read by pages."""

    def __init__(
        self,
        req_to_token: torch.Tensor,
        page_tokens: int,
        streams: Streams | None = None,
        window: Window | None = None,
    ) -> None:
        """``streams``: of the device that the table is on; None: a CPU."""
        self.page_tokens = page_tokens
        self.window = window
        self._rows = req_to_token
        self.streams = streams or Streams()

    def pages(self, request: Request, start: int, end: int) -> HostPages:
        """Those of tokens ``start`` (of a page the first) until ``end``."""
        return self.streams.pages(self._rows[request.kv.req_pool_idx, start:end], self.page_tokens)

    def window_pages(self, request: Request, start: int, end: int) -> HostPages:
        """The same in the windows' pool; 0 where a page is not there."""
        assert self.window is not None
        rows = self.window.rows[self._rows[request.kv.req_pool_idx, start:end].long()]
        return self.streams.pages(rows, self.page_tokens)
