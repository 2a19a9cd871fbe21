"""Prefill forwards of requests that nobody sent, to time them (:mod:`engine.prefill.profile`).

The requests go through SGLang's own allocation and forward, as in its
``scheduler_components/dynamic_chunk_sizer.py``. A "cached" prefix is pages that nothing was
computed into: attention takes as long over any content.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.scheduler_components.dp_attn import prepare_mlp_sync_batch_raw
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.runtime_context import get_parallel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.common import require_mlp_tp_gather

from engine.sglang.border import Use
from scheduler.quota import Chunk

T = TypeVar("T")

_SCHEDULER = "managers.scheduler.Scheduler."
_REQUEST = "managers.schedule_batch.Req."
_BATCH = "managers.schedule_batch.ScheduleBatch."
_TREE = "mem_cache.unified_radix_cache.UnifiedRadixCache."
_ARGS = "server_args.ServerArgs."
USES = (
    Use("arg_groups.model_override_base.resolved_view", "the flags as SGLang has resolved them"),
    Use(_ARGS + "kv_cache_dtype", "a profile holds for one type of KV"),
    Use(_ARGS + "attention_backend", "and one backend"),
    Use(_ARGS + "tp_size", "and number of ranks"),
    Use(_ARGS + "attn_dp_size", "and of attention groups"),
    Use(_SCHEDULER + "model_config", "the model"),
    Use("configs.model_config.ModelConfig.dtype", "a profile holds for one type of weights"),
    Use("configs.model_config.ModelConfig.context_len", "the longest request"),
    Use("configs.model_config.ModelConfig.vocab_size", "the tokens that there are"),
    Use(_SCHEDULER + "chunked_prefill_size", "the longest chunk"),
    Use(_SCHEDULER + "spec_algorithm", "handed on to a batch"),
    Use(_SCHEDULER + "tp_worker", "has the model"),
    Use("managers.tp_worker.TpModelWorker.model_runner", "runs it"),
    Use("model_executor.model_runner.ModelRunner.forward", "a forward, through our hooks"),
    Use(
        "managers.schedule_batch.Req",
        "a request",
        keywords=("rid", "origin_input_text", "origin_input_ids", "sampling_params"),
    ),
    Use(
        "sampling.sampling_params.SamplingParams",
        "its sampling",
        keywords=("temperature", "max_new_tokens"),
    ),
    Use(_REQUEST + "init_next_round_input", "it looks for a prefix, and finds none"),
    Use(_REQUEST + "last_node", "where in the tree that ends"),
    Use(_REQUEST + "kv", "where its KV is"),
    Use("managers.schedule_batch.ReqKvInfo.req_pool_idx", "its row of the table"),
    Use(_SCHEDULER + "req_to_token_pool", "has the table"),
    Use("mem_cache.memory_pool.ReqToTokenPool.req_to_token", "rows of the pool by position"),
    Use(_REQUEST + "lock", "what keeps the tree from dropping it"),
    Use(_TREE + "lock", "makes such a lock"),
    Use(_REQUEST + "prefix_len", "set: its prefix counts as cached"),
    Use(_REQUEST + "extend_end", "set: how far the forward goes"),
    Use(_BATCH + "init_new", "a batch"),
    Use(_BATCH + "prepare_for_extend", "it allocates pages"),
    Use(_BATCH + "input_ids", "made here, where SGLang leaves that for later"),
    Use(_BATCH + "prefill_input_ids_cpu", "what they are made of"),
    Use(_BATCH + "device", "where they go"),
    Use(_BATCH + "extend_lens", "new tokens of each request"),
    Use(_BATCH + "extend_logprob_start_lens", "set: no logprobs are wanted"),
    Use(
        "model_executor.forward_batch_info.ForwardBatch.init_new",
        "the batch as the model sees it",
        keywords=("return_hidden_states_before_norm",),
    ),
    Use("layers.dp_attention.set_is_extend_in_batch", "as SGLang says before a forward"),
    Use("runtime_context.get_parallel", "whether there are attention groups"),
    Use("utils.common.require_mlp_tp_gather", "how they meet"),
    Use(
        "managers.scheduler_components.dp_attn.prepare_mlp_sync_batch_raw",
        "they tell each other the sizes of their batches",
        keywords=(
            "get_idle_batch",
            "disable_cuda_graph",
            "require_mlp_tp_gather",
            "disable_overlap_schedule",
            "offload_tags",
        ),
    ),
    Use("mem_cache.common.release_kv_cache", "give the pages back", keywords=("checkpoint",)),
)


class MadeUpForwards:
    """On an engine that serves nobody yet."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.on_cuda: bool = scheduler.device == "cuda"

    def settings(self) -> dict[str, str | int]:
        """What their times depend on, apart from the machine and the model."""
        args = resolved_view(self._scheduler.server_args)
        return {
            "dtype": str(self._scheduler.model_config.dtype),
            "kv_dtype": args.kv_cache_dtype,
            "attention": args.attention_backend,
            "ranks": args.tp_size,
            "groups": args.attn_dp_size,
            "chunk_tokens": self._scheduler.chunked_prefill_size,
            "sglang": version("sglang"),
        }

    @property
    def new_tokens_max(self) -> int:
        """Of a forward."""
        return self._scheduler.chunked_prefill_size

    @property
    def tokens_max(self) -> int:
        """Of the requests of a forward, with their prefixes."""
        pool = self._scheduler.token_to_kv_pool_allocator.available_size()
        return min(self._scheduler.model_config.context_len - 1, pool // 2)

    def run(self, chunks: list[Chunk]) -> None:
        """One forward, of a request for each chunk."""
        requests = [self._request(chunk) for chunk in chunks]
        try:
            self._forward(requests, chunks)
        finally:
            self._release(requests)

    def run_prompt(self, tokens: Sequence[int], look: Callable[[torch.Tensor], T]) -> T:
        """A forward over a prompt; ``look`` gets the rows of its KV in the pool, and returns
        before they are given back."""
        request = self._request_of("prompt", tokens)
        try:
            self._forward([request], [Chunk(0, len(tokens))])
            table = self._scheduler.req_to_token_pool.req_to_token
            return look(table[request.kv.req_pool_idx, : len(tokens)])
        finally:
            self._release([request])

    def _release(self, requests: list[Req]) -> None:
        for request in requests:
            release_kv_cache(request, self._scheduler.tree_cache, checkpoint=False)

    def _forward(self, requests: list[Req], chunks: list[Chunk]) -> None:
        with_prefix = [r for r, chunk in zip(requests, chunks, strict=True) if chunk.context_tokens]
        if with_prefix:  # allocates its pages, and runs nothing
            self._batch(with_prefix).prepare_for_extend()
        for request, (context, new) in zip(requests, chunks, strict=True):
            request.prefix_len, request.extend_end = context, context + new
        batch = self._batch(requests)
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        runner = self._scheduler.tp_worker.model_runner
        if get_parallel().attn_dp_size > 1:
            _meet_groups(batch, runner)
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        set_is_extend_in_batch(True)
        runner.forward(forward_batch)

    def _request(self, chunk: Chunk) -> Req:
        tokens = random.Random(0).choices(range(self.vocabulary_tokens), k=sum(chunk))
        request = self._request_of(f"profile-{chunk.context_tokens}-{chunk.new_tokens}", tokens)
        request.extend_end = chunk.context_tokens
        return request

    @property
    def vocabulary_tokens(self) -> int:
        """Of the model."""
        return self._scheduler.model_config.vocab_size

    def _request_of(self, rid: str, tokens: Sequence[int]) -> Req:
        request = Req(
            rid=rid,
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
        )
        request.init_next_round_input(self._scheduler.tree_cache)
        request.lock = self._scheduler.tree_cache.lock(request.last_node)
        return request

    def _batch(self, requests: list[Req]) -> ScheduleBatch:
        return ScheduleBatch.init_new(
            requests,
            self._scheduler.req_to_token_pool,
            self._scheduler.token_to_kv_pool_allocator,
            self._scheduler.tree_cache,
            self._scheduler.model_config,
            False,
            self._scheduler.spec_algorithm,
        )


def _meet_groups(batch: ScheduleBatch, runner: Any) -> None:
    """Attention groups tell each other the sizes of their batches; here they are alike."""
    batch.extend_logprob_start_lens = list(batch.extend_lens)  # as of requests without any
    prepare_mlp_sync_batch_raw(
        batch,
        runner,
        get_idle_batch=lambda: batch,
        disable_cuda_graph=True,
        require_mlp_tp_gather=require_mlp_tp_gather(),
        disable_overlap_schedule=True,
        offload_tags=set(),
    )
