"""Every route of SGLang's HTTP server, and who answers it here. A test compares it with the
installed SGLang, so that a newer one shows what it has added."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from launch.gateway.request.parts import GENERATING


class Answers(Enum):
    """Who answers a route."""

    PAIR = "a prefill and a decode engine, by a plan"
    ANY = "any engine, to clients"
    ANY_TO_OPERATORS = "any engine, to operators"
    ALL = "all engines, to operators"
    GATEWAY = "the gateway"
    WEIGHTS = "the gateway, with all engines: what changes weights or has them change"
    NOBODY = "nobody"


class Route(NamedTuple):
    """``why``: what a client of a route that nobody answers is told."""

    answers: Answers
    why: str = ""


_POOLED = "embeddings, scores and classes come from one engine without P/D: start one beside this"
_TEXT = "this cluster serves text only"
_SESSIONS = "send the whole conversation, its KV is found again by its tokens"
_OLLAMA = "use /v1/chat/completions"
_SUPERVISED = "engines are the cluster's: see /workers, and python -m launch.scale"
_SEEDS = "an engine hands its weights to another one at its own port: /admin/engine/NAME/..."
_STORED = "SGLang stores no responses with P/D: send the whole conversation"
_HICACHE = "HiCache is not used here: python -m storage.cli"
_CORPORA = "there is no speculation by n-grams with P/D"

_NOBODY = {
    _POOLED: (
        *("/encode", "/classify", "/v1/embeddings", "/v1/classify", "/v1/rerank", "/v1/score"),
        *("/v1/decisions", "/v1/systemone"),
    ),
    _TEXT: ("/v1/audio/transcriptions", "/v1/realtime"),
    _SESSIONS: ("/open_session", "/close_session"),
    _OLLAMA: ("/api/chat", "/api/generate", "/vertex_generate", "/invocations"),
    _SUPERVISED: ("/pd_role_switch", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
    _SEEDS: (
        *("/init_weights_send_group_for_remote_instance", "/send_weights_to_remote_instance"),
        *("/get_remote_instance_transfer_engine_info", "/remote_instance_transfer_engine_info"),
    ),
    _STORED: ("/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    _HICACHE: (
        *("/hicache/storage-backend", "/hicache/storage-backend/clear"),
        "/get_hicache_l3_cache_layout",
    ),
    _CORPORA: ("/add_external_corpus", "/remove_external_corpus", "/list_external_corpora"),
    "the gateway has pages of its own: /dashboard": (
        *("/", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"),
        *("/api/tags", "/api/show"),
    ),
}
_SOMEBODY = {
    Answers.PAIR: GENERATING,
    Answers.ANY: (
        *("/v1/models", "/v1/models/{model:path}", "/model_info", "/get_model_info"),
        *("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
        *("/v1/messages/count_tokens", "/parse_function_call", "/separate_reasoning"),
    ),
    Answers.ANY_TO_OPERATORS: ("/server_info", "/get_server_info", "/get_weights_by_name"),
    Answers.ALL: (
        *("/start_profile", "/stop_profile", "/set_trace_level", "/freeze_gc", "/slow_down"),
        *("/start_expert_distribution_record", "/stop_expert_distribution_record"),
        *("/dump_expert_distribution_record", "/configure_logging", "/set_internal_state"),
        "/dumper/{method}",
    ),
    Answers.GATEWAY: (
        *("/health", "/health_generate", "/ready", "/ping", "/metrics", "/v1/loads"),
        *("/abort_request", "/flush_cache"),
    ),
    Answers.WEIGHTS: (
        *("/pause_generation", "/continue_generation", "/begin_weight_update"),
        *("/end_weight_update", "/update_weights_from_disk", "/update_weights_from_tensor"),
        *("/update_weights_from_distributed", "/update_weights_from_ipc"),
        *("/init_weights_update_group", "/destroy_weights_update_group"),
        *("/update_weight_version", "/release_memory_occupation", "/resume_memory_occupation"),
        *("/weights_checker", "/load_lora_adapter", "/load_lora_adapter_from_tensors"),
        "/unload_lora_adapter",
    ),
}
ROUTES: Mapping[str, Route] = {
    **{path: Route(answers) for answers, paths in _SOMEBODY.items() for path in paths},
    **{path: Route(Answers.NOBODY, why) for why, paths in _NOBODY.items() for path in paths},
}
CHANGING_STATE = frozenset(
    {path for path, (who, _) in ROUTES.items() if who in (Answers.ALL, Answers.WEIGHTS)}
    | {"/flush_cache"}
)
"""Paths that do so with whatever method."""
_FOR_OPERATORS = (Answers.ANY_TO_OPERATORS, Answers.ALL, Answers.WEIGHTS)
OPERATORS = frozenset(
    {path for path, (who, _) in ROUTES.items() if who in _FOR_OPERATORS} | {"/get_weight_version"}
)
"""Paths that are for operators alone; the last one is slime's own."""
