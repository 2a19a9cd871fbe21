"""A few seconds of made-up prefill forwards at the start, from which the quota's costs are
fitted; kept in the user's cache folder, by device and model.

The requests go through SGLang's own allocation and forward, as in its
``scheduler_components/dynamic_chunk_sizer.py``. A "cached" prefix is pages that nothing was
computed into: attention takes as long over any content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import sglang
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

from common.user_cache import cache_folder
from engine.prefill.forward_clock import ForwardClock, ForwardSample
from scheduler.quota import Chunk

log = logging.getLogger(__name__)

PROFILE_S = 3.0
"""Forwards are taken, the cheapest first, until they have lasted so long together."""
_CONTEXTS = (0, 256, 1024, 4096, 16384)
_NEW = (64, 256, 1024, 4096)
_BATCHES = ([Chunk(0, 64)] * 8, [Chunk(1024, 64)] * 8)

_decoder = msgspec.json.Decoder(list[ForwardSample])


def profile_path(scheduler: Any, model_digest: str) -> Path:
    """The file of this device and model; a profile depends on nothing else."""
    args = resolved_view(scheduler.server_args)
    on_cuda = scheduler.device == "cuda"
    subject = {
        "device": torch.cuda.get_device_name() if on_cuda else _processor(),
        "threads": 0 if on_cuda else torch.get_num_threads(),
        "model": model_digest,
        "dtype": str(scheduler.model_config.dtype),
        "kv_dtype": args.kv_cache_dtype,
        "attention": args.attention_backend,
        "ranks": args.tp_size,
        "groups": args.attn_dp_size,
        "chunk_tokens": scheduler.chunked_prefill_size,
        "sglang": sglang.__version__,
    }
    name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder() / "prefill_profiles" / f"{name}.json"


def load(path: Path) -> list[ForwardSample] | None:
    """A kept profile; None where there is none that can be read."""
    try:
        return _decoder.decode(path.read_bytes()) or None
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("profile %s cannot be read (%s): it is taken anew", path, error)
        return None


@torch.no_grad()
def take(scheduler: Any, clock: ForwardClock) -> list[ForwardSample]:
    """Run the forwards; every rank of the engine runs the same ones."""
    samples: list[ForwardSample] = []
    sink, clock.sink = clock.sink, samples.append
    try:
        for number, chunks in enumerate(_shapes(scheduler)):
            if sum(sample.forward_s for sample in samples) > PROFILE_S:
                break
            _forward(scheduler, chunks)
            if number == 0:  # a first forward takes longer than any later one
                clock.flush()
                samples.clear()
        clock.flush()
    finally:
        clock.sink = sink
    log.info("profiled %d prefill forwards", len(samples))
    return samples


def _shapes(scheduler: Any) -> Iterator[list[Chunk]]:
    new_max = scheduler.chunked_prefill_size
    pool = scheduler.token_to_kv_pool_allocator.available_size()
    tokens_max = min(scheduler.model_config.context_len - 1, pool // 2)
    grid = [Chunk(context, new) for context in _CONTEXTS for new in _NEW if new <= new_max]
    single = [[chunk] for chunk in grid if sum(chunk) <= tokens_max]
    together = [chunks for chunks in _BATCHES if sum(map(sum, chunks)) <= tokens_max]
    yield [Chunk(0, 64)]
    yield from sorted(single + together, key=lambda chunks: sum(n * (c + n) for c, n in chunks))


def _forward(scheduler: Any, chunks: list[Chunk]) -> None:
    requests = [_request(scheduler, chunk) for chunk in chunks]
    try:
        with_prefix = [r for r, chunk in zip(requests, chunks, strict=True) if chunk.context_tokens]
        if with_prefix:  # allocates its pages, and runs nothing
            _batch(scheduler, with_prefix).prepare_for_extend()
        for request, (context, new) in zip(requests, chunks, strict=True):
            request.prefix_len, request.extend_end = context, context + new
        batch = _batch(scheduler, requests)
        batch.prepare_for_extend()
        if batch.input_ids is None:
            batch.input_ids = batch.prefill_input_ids_cpu.to(batch.device)
            batch.prefill_input_ids_cpu = None
        runner = scheduler.tp_worker.model_runner
        if get_parallel().attn_dp_size > 1:
            _meet_groups(batch, runner)
        forward_batch = ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
        set_is_extend_in_batch(True)
        runner.forward(forward_batch)
    finally:
        for request in requests:
            release_kv_cache(request, scheduler.tree_cache, checkpoint=False)


def _meet_groups(batch: Any, runner: Any) -> None:
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


def _request(scheduler: Any, chunk: Chunk) -> Any:
    vocabulary = scheduler.model_config.vocab_size
    request = Req(
        rid=f"profile-{chunk.context_tokens}-{chunk.new_tokens}",
        origin_input_text="",
        origin_input_ids=array("q", random.Random(0).choices(range(vocabulary), k=sum(chunk))),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=1),
    )
    request.init_next_round_input(scheduler.tree_cache)
    request.lock = scheduler.tree_cache.lock(request.last_node)
    request.extend_end = chunk.context_tokens
    return request


def _batch(scheduler: Any, requests: list[Any]) -> Any:
    return ScheduleBatch.init_new(
        requests,
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        False,
        scheduler.spec_algorithm,
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
