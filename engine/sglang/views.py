"""What the engine sees of SGLang's objects. Outside this folder nothing else of them is used:
mypy refuses an attribute that is not here, ``test_touch_points`` one that SGLang lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from engine.sglang.border import view


@view("mem_cache.memory_pool.ReqToTokenPool")
class RowTable(Protocol):
    """Where the KV of each request's tokens is."""

    req_to_token: torch.Tensor
    """[requests, positions]: rows of the KV pool; a page's rows follow each other."""


@view("managers.schedule_batch.ReqKvInfo")
class RequestKv(Protocol):
    """A request's place in the table."""

    req_pool_idx: int


@view("managers.schedule_batch.Req")
class Request(Protocol):
    """A request, from its arrival at this engine to its end."""

    rid: str
    origin_input_ids: Sequence[int]
    """The prompt."""
    output_ids: Sequence[int]
    extra_key: str | None
    cache_salt: str | None
    kv: RequestKv
    finished_reason: object | None
    """Why it has ended, also by a failure; None as long as it has not."""
