"""DP attention (``--attn-dp-size``) on a CPU: SGLang 0.5.23 assumes CUDA in a few places.

SGLang has most of it for its own CPU engine, which needs ``sgl_kernel``. Each fix says what
fails without it.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_WATCHDOG_MS = 1000


def register_fixes() -> None:
    """Let a CPU have attention groups."""
    # Without: the first forward gathers the groups' tokens with a triton kernel and dies ("0
    # active drivers").
    HookRegistry.register("sglang.srt.layers.dp_attention.memcpy", _copy_of_group, HookType.REPLACE)
    # Without: before that it dies for a filling value that torch's native attention does not
    # name, and for pinned memory.
    HookRegistry.register(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.prepare_mlp_sync_batch",
        _before_groups_meet,
        HookType.BEFORE,
    )
    # Without: these two end in operators that only GPUs have.
    group = "sglang.srt.distributed.parallel_state.GroupCoordinator."
    HookRegistry.register(
        group + "all_gather_into_tensor",
        lambda group, output, input: group._all_gather_into_tensor(output, input),
        HookType.REPLACE,
    )
    HookRegistry.register(group + "reduce_scatter_tensor", _reduce_scatter, HookType.REPLACE)
    # Without: a group with nothing to do dies in the forward that it makes with the others.
    HookRegistry.register(
        "sglang.srt.layers.rotary_embedding.base.RotaryEmbedding.forward_native",
        _rotate_if_any,
        HookType.AROUND,
    )
    # Without (speed only): the process that hands requests to the groups looks for them without
    # a pause and takes a core: on two cores, those of P and D leave hardly any to the groups.
    HookRegistry.register(
        "sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop",
        _hand_out_requests,
        HookType.REPLACE,
    )


def _hand_out_requests(controller: Any) -> None:
    from sglang.srt.managers.io_struct import sock_recv

    while True:
        controller.soft_watchdog.feed()
        if controller.recv_from_tokenizer.poll(_WATCHDOG_MS):
            controller._request_dispatcher(sock_recv(controller.recv_from_tokenizer))


def _reduce_scatter(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    reduced = group.all_reduce(input.clone()).view(group.world_size, *output.shape)
    output.copy_(reduced[group.rank_in_group])


def _rotate_if_any(
    original: Any, rotary: Any, positions: torch.Tensor, query: Any, key: Any, *args: Any, **kw: Any
) -> Any:
    if not len(positions):
        return query, key
    return original(rotary, positions, query, key, *args, **kw)


def _copy_of_group(*args: Any) -> None:
    from sglang.srt.layers.dp_attention import memcpy_cpu

    memcpy_cpu(*args)


def _before_groups_meet(batch: Any, runner: Any, *_: Any, **__: Any) -> None:
    from sglang.srt.model_executor import forward_batch_info

    forward_batch_info._is_cpu = True
    runner.attn_backend.get_cpu_graph_seq_len_fill_value = lambda: 1
