"""What the engine sees of SGLang's objects. Outside this folder nothing else of them is used:
mypy refuses an attribute that is not here, ``test_touch_points`` one that SGLang lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from engine.sglang.border import view
from transfer.mooncake import MooncakeEngine


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
    prefix_len: int
    """Tokens whose KV was there before this forward, computed or loaded."""
    extend_end: int
    """The first token that this forward does not compute."""
    bootstrap_room: int
    """SGLang's number of the request between P and D."""
    disagg_decode_prefix_len: int
    """Tokens whose KV is at the decode engine without P."""
    pending_bootstrap: bool
    """No decode engine has said yet where it wants the request's KV."""

    def finished(self) -> bool:
        """Whether it has ended."""


@view("managers.schedule_batch.ScheduleBatch")
class Batch(Protocol):
    """The requests of one forward."""

    reqs: list[Request]


@view("model_executor.forward_batch_info.ForwardMode")
class ForwardMode(Protocol):
    """What a forward is for."""

    def is_extend(self) -> bool:
        """Prompts (also a part of them); otherwise a token for each request."""


@view("model_executor.forward_batch_info.ForwardBatch")
class ForwardBatch(Protocol):
    """A batch as the model sees it."""

    forward_mode: ForwardMode
    extend_seq_lens_cpu: Sequence[int] | None
    """Of each request the new tokens."""
    extend_prefix_lens_cpu: Sequence[int]
    """The cached ones before them."""


@view(
    "mem_cache.memory_pool.MHATokenToKVPool",
    "mem_cache.memory_pool.MLATokenToKVPool",
    "mem_cache.memory_pool.DSATokenToKVPool",
    "mem_cache.swa_memory_pool.SWAKVPool",
)
class KvPool(Protocol):
    """The KV pool of a rank: some buffers for each layer, of rows for tokens."""

    device: str
    layer_num: int

    def get_kv_size_bytes(self) -> int | tuple[int, int]:
        """Of the latent, or of K and V."""


@view("mem_cache.allocator.paged.PagedTokenToKVPoolAllocator")
class Allocator(Protocol):
    """Gives out the pages of the pool."""

    page_size: int
    """Tokens of a page."""
    num_pages: int
    """All that it has, free or not."""
    free_pages: torch.Tensor
    num_staged_pages: int
    """Freed, and not among the free ones yet."""

    def available_size(self) -> int:
        """Tokens that it can give out. For the scheduler's thread only: it is hooked."""

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Rows of so many tokens, page after page; None if there are no more."""

    def get_kvcache(self) -> KvPool:
        """The pool."""


@view("mem_cache.unified_radix_cache.UnifiedRadixCache")
class PrefixTree(Protocol):
    """The engine's own prefix cache."""

    def evictable_size(self) -> int:
        """Tokens of which nobody has need at present."""


@view("distributed.device_communicators.mooncake_transfer_engine.MooncakeTransferEngine")
class TransferEngine(Protocol):
    """The Mooncake engine that all of a process share."""

    engine: MooncakeEngine
    """Mooncake's own."""
    hostname: str

    def register(self, ptr: int, length: int) -> None:
        """Make memory usable for transfers of both sides."""

    def deregister(self, ptr: int) -> None:
        """It is not any more: other memory may come to lie there, and be registered."""

    def get_session_id(self) -> str:
        """How others address it: "host:port"."""

    def transfer_sync(
        self, session_id: str, buffer: int, peer_buffer_address: int, length: int
    ) -> int:
        """Write to another engine's memory; 0 if that succeeded."""


@view("disaggregation.prefill.PrefillBootstrapQueue")
class BootstrapQueue(Protocol):
    """Requests of a prefill engine that have not met their decode engine yet."""

    kv_manager: object
    """For :class:`engine.sglang.prefill.send_manager.SendManager`."""


@view("server_args.ServerArgs")
class ServerArgs(Protocol):
    """SGLang's flags."""

    tp_size: int


@view("distributed.parallel_state.GroupCoordinator")
class Group(Protocol):
    """Ranks that work together."""

    rank_in_group: int
    world_size: int
    cpu_group: ProcessGroup


@view("managers.scheduler.Scheduler")
class Scheduler(Protocol):
    """SGLang's scheduler: one in each rank's process, with all that it owns."""

    server_args: ServerArgs
    device: str
    chunked_prefill_size: int | None
    """New tokens of a batch at most; None: prompts are not cut."""
    sliding_window_size: int | None
    """How far back a token looks beside itself in layers with a window, if there are any."""
    waiting_queue: list[Request]
    disagg_prefill_bootstrap_queue: BootstrapQueue
    disagg_prefill_inflight_queue: list[Request]
    """Requests whose forward has run and whose KV is on its way."""
    req_to_token_pool: RowTable
    token_to_kv_pool_allocator: Allocator
    tree_cache: PrefixTree
    tp_cpu_group: ProcessGroup
    """All ranks of the engine."""
    attn_tp_group: Group
    """Those that share requests."""
    attn_tp_cpu_group: ProcessGroup
    """Theirs."""
