"""In which pages of the KV pool a request's tokens are."""

from __future__ import annotations

import torch

from engine.sglang.views import Request
from engine.streams import HostPages, Streams


class PageTable:
    """SGLang's table by rows ([requests, positions], changing), read by pages."""

    def __init__(
        self, req_to_token: torch.Tensor, page_tokens: int, streams: Streams | None = None
    ) -> None:
        """``streams``: of the device that the table is on; None: a CPU."""
        self.page_tokens = page_tokens
        self._rows = req_to_token
        self.streams = streams or Streams()

    def pages(self, request: Request, start: int, end: int) -> HostPages:
        """Those of tokens ``start`` (of a page the first) until ``end``."""
        return self.streams.pages(self._rows[request.kv.req_pool_idx, start:end], self.page_tokens)
