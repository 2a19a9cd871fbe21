"""DP attention (``--attn-dp-size``) on a CPU: SGLang 0.5.23 assumes CUDA in a few places.

SGLang has most of it for its own CPU engine, which needs ``sgl_kernel``.
"""

from __future__ import annotations

from typing import Any

import torch

from engine.sglang.border import Use

_CONTROLLER = "managers.data_parallel_controller.DataParallelController."
_GROUP = "distributed.parallel_state.GroupCoordinator."
USES = (
    Use("layers.dp_attention.memcpy_cpu", "what copies on a CPU"),
    Use("model_executor.forward_batch_info._is_cpu", "set: no pinned memory"),
    Use("model_executor.model_runner.ModelRunner.attn_backend", "given the value that it lacks"),
    Use(
        "layers.attention.hybrid_linear_attn_backend.MambaAttnBackendBase"
        ".get_cpu_graph_seq_len_fill_value",
        "that value, as another backend has it",
    ),
    Use(_GROUP + "_all_gather_into_tensor", "what gathers by torch's own means"),
    Use(_GROUP + "all_reduce", "a reduce-scatter is made of it"),
    Use(_GROUP + "world_size", "how many shares that has"),
    Use(_GROUP + "rank_in_group", "which is this rank's"),
    Use(_CONTROLLER + "soft_watchdog", "fed while nothing comes"),
    Use("utils.watchdog.Watchdog.feed", "feeds it"),
    Use(_CONTROLLER + "recv_from_tokenizer", "where requests come from"),
    Use(_CONTROLLER + "_request_dispatcher", "hands one to a group"),
    Use("managers.io_struct.sock_recv", "reads one"),
)
_WATCHDOG_MS = 1000


def hand_out_requests(controller: Any) -> None:
    """For ``DataParallelController.event_loop``."""
    from sglang.srt.managers.io_struct import sock_recv

    while True:
        controller.soft_watchdog.feed()
        if controller.recv_from_tokenizer.poll(_WATCHDOG_MS):
            controller._request_dispatcher(sock_recv(controller.recv_from_tokenizer))


def all_gather(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    """For ``GroupCoordinator.all_gather_into_tensor``."""
    group._all_gather_into_tensor(output, input)


def reduce_scatter(group: Any, output: torch.Tensor, input: torch.Tensor) -> None:
    """For ``GroupCoordinator.reduce_scatter_tensor``."""
    reduced = group.all_reduce(input.clone()).view(group.world_size, *output.shape)
    output.copy_(reduced[group.rank_in_group])


def rotate_if_any(
    original: Any, rotary: Any, positions: torch.Tensor, query: Any, key: Any, *args: Any, **kw: Any
) -> Any:
    """AROUND ``RotaryEmbedding.forward_native``."""
    if not len(positions):
        return query, key
    return original(rotary, positions, query, key, *args, **kw)


def copy_of_group(*args: Any, **kwargs: Any) -> None:
    """For ``memcpy``."""
    from sglang.srt.layers.dp_attention import memcpy_cpu

    memcpy_cpu(*args, **kwargs)


def before_groups_meet(batch: Any, model_runner: Any, *_: Any, **__: Any) -> None:
    """BEFORE ``ForwardBatch.prepare_mlp_sync_batch``."""
    from sglang.srt.model_executor import forward_batch_info

    forward_batch_info._is_cpu = True
    model_runner.attn_backend.get_cpu_graph_seq_len_fill_value = lambda: 1
