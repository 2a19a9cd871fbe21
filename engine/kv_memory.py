"""The KV memory map: where a page's layer block lies in the pool of a running engine.

In every supported pool (:mod:`engine.sglang.kv_pool`), page ``p`` of a buffer is the contiguous
range ``[base + p * page_bytes, base + (p + 1) * page_bytes)``; page 0 is SGLang's padding page.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import torch

from common.block import BlockLayout, Part
from engine.sglang.views import TransferEngine
from transfer.mooncake import Addresses, batches, transfer_batch
from transfer.ranges import merge_adjacent

NOISE_ROWS = 4096


class PartMemory(msgspec.Struct, frozen=True):
    """Where a part of the model's state lies, by places of a pool of its own."""

    part: Part
    """With the layout of whole objects, as ``KvMemory.layout`` has it."""
    addresses: list[list[int]]
    """``[layer][component]``; 0 in layers that have none."""


class KvMemory(msgspec.Struct, frozen=True):
    """``addresses[layer][component]``: base address of a buffer of this rank; components are
    (K, V) for MHA/GQA, (latent,) for MLA and (latent, index keys) for sparse attention, where 0
    stands for what a layer does not have, such as all of a layer whose state is another part's."""

    layout: BlockLayout
    """Of whole blocks; ``layout.shard`` is what this rank holds of one."""
    addresses: list[list[int]]
    kv_dtype: str
    has_latents: bool = False
    """A layer may then call its attention several times (MLA)."""
    parts: tuple[PartMemory, ...] = ()
    unstored: str = ""
    """Why none of it is stored, and so none restored: there is more to the model's state. Empty:
    it is stored."""

    @property
    def kv_layers(self) -> list[int]:
        """Layers of the model that have KV, in the order of the pool's buffers."""
        return [n for n in range(self.layout.num_layers) if self.layout.sizes(n)[0]]

    @property
    def bases(self) -> set[int]:
        """Of all buffers."""
        each = [self.addresses, *(part.addresses for part in self.parts)]
        return {base for layers in each for bases in layers for base in bases if base}

    def with_draft(self, draft: KvMemory) -> KvMemory:
        """The model's memory and, behind its layers, a draft's; pages have the same numbers in
        both. Raises :class:`UnlikeDraft` if a layer of one is not like those of the other."""
        own, other = self.layout, draft.layout
        layouts = [msgspec.structs.replace(of, num_layers=0, absent=()) for of in (own, other)]
        if self.parts or draft.parts:
            raise UnlikeDraft("its model or itself has windows or states")
        if layouts[0] != layouts[1] or self.kv_dtype != draft.kv_dtype:
            raise UnlikeDraft(
                f"a page of its layers has {other.component_bytes} bytes of {draft.kv_dtype}, of "
                f"the model's {own.component_bytes} of {self.kv_dtype}"
            )
        absent = own.absent
        if other.absent or absent:
            none = ((),) * len(own.component_bytes)
            absent = tuple(
                (*of_model, *(own.num_layers + layer for layer in of_draft))
                for of_model, of_draft in zip(absent or none, other.absent or none, strict=True)
            )
        layout = msgspec.structs.replace(
            own,
            num_layers=own.num_layers + other.num_layers,
            absent=absent,
            draft_layers=other.num_layers,
        )
        return msgspec.structs.replace(
            self, layout=layout, addresses=self.addresses + draft.addresses
        )

    def address(self, layer: int, component: int, page: int) -> int:
        """First byte of one page's component in one layer."""
        return (
            self.addresses[layer][component] + page * self.layout.shard.component_bytes[component]
        )


class UnlikeDraft(Exception):
    """A draft whose layers are not like the model's, and so no layers of a block."""

    def __init__(self, why: str) -> None:
        super().__init__(
            f"DualPath cannot serve this draft: {why}. Take --speculative-algorithm out."
        )


def page_runs(
    local_pages: Addresses,
    remote_pages: Addresses,
    local_bases: Addresses,
    remote_bases: Addresses,
    page_bytes: Addresses,
) -> tuple[Addresses, Addresses, Addresses]:
    """Where pages lie in some buffers here, where there, and how long.

    Pages have shape (n,), the rest shape (buffers,). Returns three arrays of equal length
    (at most n x buffers): neighbours that are contiguous on both sides are merged.
    """
    local = local_bases[:, None] + local_pages * page_bytes[:, None]
    remote = remote_bases[:, None] + remote_pages * page_bytes[:, None]
    lengths = np.broadcast_to(page_bytes[:, None], local.shape)
    return merge_adjacent(local.ravel(), remote.ravel(), lengths.ravel())


class MemoryUnreachable(Exception):
    """The transport cannot read the KV pool of this process: every transfer would fail."""

    def __init__(self, what: str, code: int) -> None:
        super().__init__(
            f"Mooncake cannot reach this engine's KV memory ({what}, code {code}). On GPUs: load "
            "nvidia-peermem, or a driver with dma-buf (NVIDIA's open kernel modules), and raise "
            "the limit of locked memory (ulimit -l unlimited); or use --transfer tcp."
        )


def check_reachable(transfer_engine: TransferEngine, memory: KvMemory) -> None:
    """Read the first bytes of each buffer as others will; raises :class:`MemoryUnreachable`.

    SGLang goes on when the registration of its buffers has failed.
    """
    words = np.zeros(8, np.uint8)
    transfer_engine.register(int(words.ctypes.data), words.nbytes)
    remote = np.array(sorted(memory.bases))
    local = np.full_like(remote, words.ctypes.data)
    lengths = np.full_like(remote, words.nbytes)
    session, code = transfer_engine.get_session_id(), 0
    for part in batches(lengths):
        code = code or transfer_batch(
            transfer_engine.engine, "read", session, local[part], remote[part], lengths[part]
        )
    transfer_engine.deregister(int(words.ctypes.data))
    if code != 0:
        raise MemoryUnreachable("a read of its own", code)


def poison(
    buffers: Iterable[torch.Tensor],
    dtype: torch.dtype,
    page_tokens: int,
    kept_pages: Sequence[int],
) -> None:
    """Fill buffers of KV rows, (rows, ...) each, with noise, except those pages. For tests:
    a delivery that never happened is seen then. The noise of a buffer repeats: to draw all of
    it takes an engine of 64 Ki tokens half a second, at each flush. ``dtype``: of the noise, where
    SGLang keeps bytes; none of it, nor of scales among it, is infinite or no number."""
    pages = torch.tensor(kept_pages, dtype=torch.int64)
    kept = (pages[:, None] * page_tokens + torch.arange(page_tokens)).reshape(-1)
    each_once = {buffer.data_ptr(): buffer for buffer in buffers}  # layers may share one
    for buffer in each_once.values():
        rows = buffer[kept].clone()
        noise = torch.empty_like(buffer[:NOISE_ROWS], dtype=torch.float32).normal_(0, 3)
        noise = noise.to(dtype).view(buffer.dtype)
        for part in buffer.split(NOISE_ROWS):
            part.copy_(noise[: len(part)])
        buffer[kept] = rows


def poison_index_keys(
    buffers: Iterable[torch.Tensor], key_bytes: int, kept_pages: Sequence[int]
) -> None:
    """The same of index keys, (pages, bytes) each: ``key_bytes`` of float8, then their scales."""
    kept = torch.tensor(kept_pages, dtype=torch.int64)
    for buffer in filter(len, buffers):
        pages, (count, page_bytes) = buffer[kept].clone(), buffer.shape
        keys = torch.randn(count, key_bytes, device=buffer.device).to(torch.float8_e4m3fn)
        scales = torch.rand(count, (page_bytes - key_bytes) // 4, device=buffer.device)
        buffer[:, :key_bytes] = keys.view(torch.uint8)
        buffer[:, key_bytes:] = scales.view(torch.uint8)
        buffer[kept] = pages
