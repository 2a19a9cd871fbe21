"""In which pages of the KV pool a request's tokens are."""

from __future__ import annotations

import numpy as np
import torch

from engine.sglang.views import Request
from transfer.ranges import Addresses


class PageTable:
    """SGLang's table by rows ([requests, positions], changing), read by pages."""

    def __init__(self, req_to_token: torch.Tensor, page_tokens: int) -> None:
        self.page_tokens = page_tokens
        self._rows = req_to_token

    def pages(self, request: Request, start: int, end: int) -> Addresses:
        """Those of tokens ``start`` (of a page the first) until ``end``. Shape (pages,)."""
        rows = self._rows[request.kv.req_pool_idx, start : end : self.page_tokens]
        return rows.cpu().numpy().astype(np.int64) // self.page_tokens
