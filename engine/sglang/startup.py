"""The engine runtime starts within SGLang's scheduler process."""

from __future__ import annotations

import logging
import os
from typing import Any

from sglang.srt.arg_groups.model_override_base import resolved_view
from sglang.srt.distributed.parallel_state import get_mooncake_transfer_engine
from sglang.srt.mem_cache.utils import get_hash_str
from sglang.srt.runtime_context import get_parallel

from common.loads import ModelBounds
from common.process_settings import RUN_FOLDER, incarnation, shared_memory_of
from common.user_files import private
from engine.config import EngineConfig
from engine.host import Host
from engine.kv_memory import KvMemory, MemoryUnreachable, check_reachable
from engine.refused import refused_settings
from engine.report import EngineIdentity
from engine.runtime import EngineRuntime, set_runtime
from engine.sglang.border import Use
from engine.sglang.kv_pool import (
    allocators_of,
    kv_format,
    memory_of,
    send_whole_pages,
    shared_indexers,
    window_of,
)
from engine.sglang.kv_settings import kv_settings
from engine.sglang.pool_hooks import draft_pool, poison_pool
from engine.sglang.states.pool import StateCopies, StateSlots, unstored_because
from engine.sglang.views import Allocator
from engine.sglang.witness_kv import witness_values
from engine.streams import Cuda, Streams, writes_are_ordered
from transfer.connections import data_port
from transfer.ports.source_filter import admit_only

log = logging.getLogger(__name__)

_ARGS = "server_args.ServerArgs."
_SCHEDULER = "managers.scheduler.Scheduler."

USES = (
    Use("arg_groups.model_override_base.resolved_view", "flags as they hold, not as given"),
    Use(_SCHEDULER + "server_args", "SGLang's flags"),
    Use(_ARGS + "pp_size", "refused above 1"),
    Use(_ARGS + "dp_size", "refused above 1"),
    Use(_ARGS + "attn_cp_size", "refused above 1"),
    Use(_ARGS + "disaggregation_enable_kv_checksum", "refused with a layer window"),
    Use(_ARGS + "speculative_algorithm", "refused with a layer window"),
    Use(_ARGS + "cuda_graph_config", "a layer window needs eager prefill forwards"),
    Use("model_executor.cuda_graph_config.CudaGraphConfig.prefill", "their part of it"),
    Use("model_executor.cuda_graph_config.PhaseConfig.backend", "which kind of graph"),
    Use(_ARGS + "attn_dp_size", "attention groups are engines of their own, refused with windows"),
    Use(_ARGS + "model_path", "the weights' folder"),
    Use(_ARGS + "weight_version", "the weights' name, where they have one"),
    Use(_ARGS + "disaggregation_bootstrap_port", "a prefill engine's, for the gateway"),
    Use("runtime_context.get_parallel", "which attention group and which rank this is"),
    Use("server_args.ServerArgs.nnodes", "over how many hosts its ranks are spread"),
    Use("distributed.parallel_state.get_mooncake_transfer_engine", "Mooncake's, of the process"),
    Use(_SCHEDULER + "model_config", "the model"),
    Use("configs.model_config.ModelConfig.vocab_size", "what the gateway lets requests name"),
    Use("configs.model_config.ModelConfig.context_len", "what the gateway lets requests fill"),
    Use(_SCHEDULER + "max_req_input_len", "the longest prompt"),
    Use(_SCHEDULER + "max_total_num_tokens", "the longest prompt of a decode engine"),
    Use(_SCHEDULER + "page_size", "the longest prompt of a decode engine"),
    Use(_SCHEDULER + "disagg_decode_prealloc_queue", "the longest prompt of a decode engine"),
    Use(
        "disaggregation.decode.DecodePreallocQueue.num_reserved_decode_tokens",
        "the longest prompt of a decode engine",
    ),
    Use("configs.model_config.ModelConfig.get_total_num_kv_heads", "at all ranks together"),
    Use("configs.model_config.ModelConfig.dtype", "the type in which it computes"),
    Use(_SCHEDULER + "req_to_token_pool", "has the states of recurrent layers, if there are any"),
    Use("mem_cache.memory_pool.HybridReqToTokenPool.mamba_pool", "their pool"),
    Use("mem_cache.memory_pool.HybridReqToTokenPool.mamba_allocator", "gives out its slots"),
    Use(_SCHEDULER + "sliding_window_size", "tokens before it that one attends to, or None"),
    Use(_SCHEDULER + "token_to_kv_pool_allocator", "has the KV pool"),
    Use("mem_cache.allocator.base.BaseTokenToKVPoolAllocator.get_kvcache", "the KV pool"),
    Use(_SCHEDULER + "enable_overlap", "forwards have a stream of their own"),
    Use(_SCHEDULER + "forward_stream", "which that is"),
    Use("mem_cache.utils.get_hash_str", "compiled when first used: 5 s that a request would wait"),
)


def after_init_disaggregation(result: Any, scheduler: Any) -> None:
    """AFTER ``Scheduler.init_disaggregation``: SGLang's P/D side exists."""
    config = EngineConfig.from_env()
    host = _host(config, scheduler)
    check_reachable(host.transfer_engine, host.memory)
    admit_only(config.heard)  # the ports of SGLang's own P/D side too
    engine = EngineRuntime(config, host)
    set_runtime(engine)
    if engine.memory.unstored:
        log.warning("nothing of this model is stored or restored: %s", engine.memory.unstored)
    else:
        engine.compare_witness(witness_values(scheduler, engine))
    engine.prefill_timing.start_quota(
        engine.weights.namespace.model_digest, engine.memory.layout.page_tokens
    )
    if config.role == "prefill":
        get_hash_str([0])
    config.experiment.announce(log)
    if config.experiment.poison_kv:
        poison_pool(engine, scheduler)


def _host(config: EngineConfig, scheduler: Any) -> Host:
    # As given, --dp-size may still be an older name for --attn-dp-size.
    given = scheduler.server_args
    args = resolved_view(given)
    if max(args.pp_size, args.dp_size, args.attn_cp_size) > 1:
        raise NotImplementedError("DualPath knows --tp and --attn-dp-size: take others out")
    if reason := refused_settings(args):
        raise NotImplementedError(f"{reason}: take it out")
    _check_device(config, args, scheduler.device)
    send_whole_pages(scheduler)
    memory = _memory(scheduler)
    if _has_states(scheduler):
        _check_recurrent(config, args)
    elif memory.parts:
        _check_windows(config, args, memory)
    group = get_parallel().attn_dp_rank
    transfer_engine = get_mooncake_transfer_engine()
    is_prefill = config.role == "prefill"
    return Host(
        identity=EngineIdentity(
            name=f"{config.name}.{group}" if args.attn_dp_size > 1 else config.name,
            role=config.role,
            agent=config.agent,
            group=config.name,
            incarnation=incarnation(),
            bootstrap_port=int(given.disaggregation_bootstrap_port) if is_prefill else 0,
            bounds=_bounds(scheduler),
        ),
        control=_control(config, scheduler, group),
        scheduler=scheduler,
        transfer_engine=transfer_engine,
        data_port=data_port(transfer_engine.get_session_id()),
        memory=memory,
        allocators=_allocators(scheduler, memory),
        window=window_of(scheduler),
        states=_states(scheduler, memory),
        streams=_streams(scheduler),
        model_path=given.model_path,
        weight_version=str(given.weight_version or ""),
        settings=kv_settings(
            given,
            str(scheduler.model_config.dtype).removeprefix("torch."),
            kv_format(scheduler),
        ),
    )


def _memory(scheduler: Any) -> KvMemory:
    kv_heads = scheduler.model_config.get_total_num_kv_heads()
    memory = memory_of(
        scheduler.token_to_kv_pool_allocator.get_kvcache(),
        kv_heads,
        shared_indexers(scheduler.model_config),
        scheduler.sliding_window_size or 0,
        _states_unstored(scheduler),
    )
    draft = draft_pool(scheduler)
    if draft is None or memory.unstored:  # such a model's draft is refused
        return memory
    return memory.with_draft(memory_of(draft, kv_heads))


def _has_states(scheduler: Any) -> bool:
    return hasattr(scheduler.req_to_token_pool, "mamba_pool")


def _states_unstored(scheduler: Any) -> str:
    """Why states are not stored, where the model has any; empty if they are."""
    if not _has_states(scheduler):
        return ""
    if resolved_view(scheduler.server_args).tp_size > 1:
        return "ranks split the states of its recurrent layers (--tp-size)"
    why = unstored_because(scheduler.req_to_token_pool)
    return f"it has recurrent layers, and {why}" if why else ""


def _states(scheduler: Any, memory: KvMemory) -> StateCopies | None:
    """Where they are stored."""
    is_stored = any(each.part.kind == "state" for each in memory.parts)
    return StateCopies(scheduler.req_to_token_pool.mamba_pool) if is_stored else None


def _allocators(scheduler: Any, memory: KvMemory) -> list[Allocator]:
    """Of the blocks' pages, then of each part's places."""
    of_pages = allocators_of(scheduler.token_to_kv_pool_allocator)
    if _states(scheduler, memory) is None:
        return of_pages
    table = scheduler.req_to_token_pool
    slots: Allocator = StateSlots(table.mamba_allocator, table.mamba_pool)
    return [*of_pages, *(slots for _ in memory.parts)]


def _control(config: EngineConfig, scheduler: Any, group: int) -> str:
    """What this rank is to bind, as the first one that its group has on this host."""
    rank = scheduler.attn_tp_group.rank_in_group
    parallel = get_parallel()
    rank_on_host = parallel.tp_rank % (parallel.tp_size // parallel.nnodes)
    return config.controls[group] if min(rank, rank_on_host) == 0 else ""


def after_batch_register(result: int, *_: Any, **__: Any) -> None:
    """AFTER ``MooncakeTransferEngine.batch_register``, whose code SGLang drops."""
    if result != 0:
        raise MemoryUnreachable("the registration of its buffers", result)


def after_shm_path_for(path: str, _: str) -> None:
    """AFTER ``shm_path_for``: noted before it is made, the file goes with this process, however
    soon that is killed."""
    if folder := os.environ.get(RUN_FOLDER):
        with open(shared_memory_of(os.getsid(0), folder), "ab", opener=private) as noted:
            noted.write(os.fsencode(os.path.basename(path)) + b"\n")


def _check_device(config: EngineConfig, args: Any, device: str) -> None:
    if config.layer_window and args.disaggregation_enable_kv_checksum:
        raise NotImplementedError(
            "--disaggregation-enable-kv-checksum cannot work with --prefill-layer-window: other "
            "layers' KV is in the buffers when it is computed; take one of the two out"
        )
    if config.layer_window and args.speculative_algorithm:
        raise NotImplementedError(
            "--speculative-algorithm cannot work with --prefill-layer-window: the draft's layers "
            "have no place in the window; take one of the two out"
        )
    if not device.startswith("cuda"):
        return
    if config.layer_window and args.cuda_graph_config.prefill.backend != "disabled":
        raise NotImplementedError(
            "--prefill-layer-window needs --cuda-graph-backend-prefill disabled: a graph that is "
            "replayed writes to buffers that may not be free yet"
        )
    if os.environ.get("MOONCAKE_PROTOCOL", "rdma") == "rdma" and not writes_are_ordered():
        raise NotImplementedError(
            "this GPU does not order what NICs write to its memory "
            "(cudaDevAttrGPUDirectRDMAWritesOrdering is none): use --transfer tcp"
        )


def _check_windows(config: EngineConfig, args: Any, memory: KvMemory) -> None:
    """What does not go together with windows in a pool of their own."""
    refused = {
        "--prefill-layer-window: windows are in device memory for as long as a request": (
            config.layer_window
        ),
        "--tp-size above 1: nobody has tried windows that each rank has whole": (
            args.tp_size > 1 and memory.layout.shards == 1
        ),
        "--attn-dp-size: nobody has tried windows of attention groups": args.attn_dp_size > 1,
        "--speculative-algorithm: nobody has tried a draft's layers beside windows": (
            args.speculative_algorithm
        ),
        "--disaggregation-enable-kv-checksum: its digests know nothing of windows": (
            args.disaggregation_enable_kv_checksum
        ),
    }
    for why, is_on in refused.items():
        if is_on:
            raise NotImplementedError(
                f"a model with sliding windows does not go together with {why}; take it out"
            )


def _check_recurrent(config: EngineConfig, args: Any) -> None:
    """What does not go together with recurrent layers."""
    refused = {
        "--prefill-layer-window": config.layer_window,
        "--speculative-algorithm": args.speculative_algorithm,
    }
    for flag, value in refused.items():
        if value is not None:
            raise NotImplementedError(f"a model with recurrent layers needs {flag} taken out")


def _bounds(scheduler: Any) -> ModelBounds:
    prompt_tokens_max = scheduler.max_req_input_len
    queue = scheduler.disagg_decode_prealloc_queue
    if queue is not None:
        # A longer one would wait for ever, and all that come after it: a decode engine admits a
        # prompt in whole pages and with room for an answer.
        page_tokens = scheduler.page_size
        room_tokens = scheduler.max_total_num_tokens - queue.num_reserved_decode_tokens
        prompt_tokens_max = min(prompt_tokens_max, room_tokens // page_tokens * page_tokens)
    return ModelBounds(
        vocabulary_tokens=scheduler.model_config.vocab_size,
        context_tokens=scheduler.model_config.context_len,
        prompt_tokens_max=prompt_tokens_max,
    )


def _streams(scheduler: Any) -> Streams:
    if not scheduler.device.startswith("cuda"):
        return Streams()
    return Streams(Cuda(), scheduler.forward_stream if scheduler.enable_overlap else None)
