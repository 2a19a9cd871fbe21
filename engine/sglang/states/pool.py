"""SGLang's pool of the states of recurrent layers (Mamba-2, gated delta rule).

A *slot* has one state of every such layer: a request's, or a snapshot at a boundary. Behind
SGLang's own slots the pool has some *spare* ones, of which SGLang knows nothing: a snapshot on
its way out is copied there, so that SGLang may do with its own what it likes.
"""

from __future__ import annotations

from typing import Any

import torch

from common.block import BlockLayout, Part
from engine.kv_memory import PartMemory
from engine.sglang.border import Use

SPARES = 4
"""Snapshots that an engine can have on their way out at once."""

_POOL = "mem_cache.memory_pool.MambaPool"
_TABLE = "mem_cache.memory_pool.HybridReqToTokenPool."
_SLOTS = "mem_cache.allocator.mamba.MambaSlotAllocator."
USES = (
    Use(_POOL, "known by its name: states of recurrent layers, by slots"),
    Use(_POOL + ".get_contiguous_buf_infos", "address and bytes of a slot of each buffer"),
    Use(_POOL + ".mamba_layer_ids", "which layers of the model have a state"),
    Use(_POOL + ".mamba_cache", "the buffers"),
    Use(_POOL + ".State.conv", "inputs of convolutions"),
    Use(_POOL + ".State.temporal", "recurrences"),
    Use(_POOL + ".size", "slots that SGLang knows of"),
    Use(_POOL + ".copy_from", "a snapshot into a spare slot"),
    Use(_POOL + "._slot_siblings", "further states by slots: not stored"),
    Use(_POOL + ".enable_linear_replayssm", "states lag behind: not stored"),
    Use(_POOL + ".enable_linear_replayssm_spec", "the same"),
    Use(_TABLE + "mamba_pool", "the pool"),
    Use(_TABLE + "mamba_ckpt_pool", "snapshots in 8 bits: not stored"),
    Use(_TABLE + "enable_mamba_extra_buffer", "whether snapshots are taken at all"),
    Use(_TABLE + "enable_mamba_extra_buffer_lazy", "at other moments: not stored"),
    Use(_SLOTS + "free_slots", "which are free"),
    Use(_SLOTS + "size", "how many there are"),
    Use(_SLOTS + "alloc", "take some"),
    Use(_SLOTS + "available_size", "how many are free"),
)


class StateSlots:
    """SGLang's allocator of slots, seen as one of pages: a slot is a page of one token."""

    page_size = 1
    num_staged_pages = 0

    def __init__(self, allocator: Any, pool: Any) -> None:
        self.allocator = allocator
        self._pool = pool
        self.num_pages = allocator.size + SPARES

    @property
    def free_pages(self) -> torch.Tensor:
        return self.allocator.free_slots

    @free_pages.setter
    def free_pages(self, slots: torch.Tensor) -> None:
        self.allocator.free_slots = slots

    def available_size(self) -> int:
        return self.allocator.available_size()

    def alloc(self, need_size: int) -> torch.Tensor | None:
        return self.allocator.alloc(need_size)

    def get_kvcache(self) -> Any:
        return self._pool


class StateCopies:
    """Copies of slots, in the spare ones."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.spares = spares_of(pool)
        self._numbers = torch.tensor(self.spares, device=pool.mamba_cache.temporal.device)

    def copy(self, slot: torch.Tensor, spare: int) -> None:
        """Queue it in the caller's current stream. ``slot`` has shape (1,)."""
        if slot.is_cuda:  # untested: the request gives the tensor up, maybe before it is read
            slot.record_stream(torch.cuda.current_stream(slot.device))
        at = spare - self.spares.start
        self._pool.copy_from(slot.long(), self._numbers[at : at + 1])


def spares_of(pool: Any) -> range:
    """The spare slots' numbers; slot 0 is SGLang's dummy."""
    return range(pool.size + 1, pool.size + 1 + SPARES)


def unstored_because(requests: Any) -> str:
    """Why the states of such a model, whose table of requests this is, are not stored; empty if
    they can be."""
    pool = requests.mamba_pool
    if type(pool).__name__ != "MambaPool":
        return f"of a {type(pool).__name__} nothing is known"
    buffers = [*pool.mamba_cache.conv, pool.mamba_cache.temporal]
    reasons = {
        "requests have states beside them": bool(pool._slot_siblings),
        "they lag behind their tokens (--enable-linear-replayssm)": (
            pool.enable_linear_replayssm or pool.enable_linear_replayssm_spec
        ),
        "SGLang keeps snapshots in 8 bits": requests.mamba_ckpt_pool is not None,
        "SGLang takes no snapshots at the ends of pages": not requests.enable_mamba_extra_buffer
        or requests.enable_mamba_extra_buffer_lazy,
        "a layer's slots do not follow each other": not all(b.is_contiguous() for b in buffers),
    }
    return next((why for why, is_so in reasons.items() if is_so), "")


def state_parts(pool: Any, num_layers: int, page_tokens: int, block_bytes: int) -> list[PartMemory]:
    """The pool as parts over a model's ``num_layers``, as few as can be of which none is larger
    than a block, or than one layer's state.

    Slots of storage are as large as the largest object of a namespace. A snapshot in one piece
    would be dozens of blocks, and each block would lie in a slot of that size.
    """
    pointers, _, slot_bytes = pool.get_contiguous_buf_infos()
    layers, buffers = list(pool.mamba_layer_ids), len(pool.mamba_layer_ids)
    components = len(pointers) // buffers
    sizes = tuple(int(slot_bytes[c * buffers]) for c in range(components))
    of_part = max(1, block_bytes // sum(sizes))
    groups = [layers[n : n + of_part] for n in range(0, buffers, of_part)]
    parts = []
    for number, group in enumerate(groups):
        others = tuple(n for n in range(num_layers) if n not in group)
        absent = (others,) * components if others else ()
        layout = BlockLayout(page_tokens, num_layers, sizes, absent=absent)
        addresses = [[0] * components for _ in range(num_layers)]
        for layer in group:
            at = layers.index(layer)
            addresses[layer] = [int(pointers[c * buffers + at]) for c in range(components)]
        name = f"state{number}" if len(groups) > 1 else "state"
        parts.append(PartMemory(Part(name, layout, 1), addresses))
    return parts


def types_of(pool: Any) -> str:
    """Of the numbers in its buffers."""
    buffers = [*pool.mamba_cache.conv, pool.mamba_cache.temporal]
    return " ".join(str(each.dtype).removeprefix("torch.") for each in buffers)
