"""The functions of SGLang's HTTP server that call us."""

from __future__ import annotations

from engine.sglang.border import Hook

HTTP = (
    Hook(
        "server_args.ServerArgs.from_cli_args",
        "after",
        "engine.sglang.http.door:after_from_cli_args",
        "the engine's HTTP port takes calls with the gateway's key alone",
    ),
    Hook(
        "server_args.ServerArgs.resolved_dict",
        "after",
        "engine.sglang.http.door:after_resolved_dict",
        "no log shows the key",
    ),
    Hook(
        "managers.tokenizer_manager.TokenizerManager.generate_request",
        "around",
        "engine.sglang.http.answers:around_generate",
        "all routes' prompts come here as token ids; where a body takes no id, ours is set",
    ),
    Hook(
        "entrypoints.openai.serving_base.OpenAIServingBase.handle_request",
        "around",
        "engine.sglang.http.answers:around_route",
        "a chat's answer brings its token ids, where a job records them",
    ),
    Hook(
        "entrypoints.anthropic.serving.AnthropicServing.handle_messages",
        "around",
        "engine.sglang.http.answers:around_route",
        "the gateway plans by the token ids that SGLang itself makes of a request",
    ),
    Hook(
        "entrypoints.openai.serving_responses.OpenAIServingResponses.create_responses",
        "around",
        "engine.sglang.http.answers:around_route",
        "the same",
    ),
    Hook(
        "disaggregation.common.conn.CommonKVManager._get_prefill_recompute_session",
        "after",
        "engine.sglang.http.door:after_recompute_session",
        "a decode engine that recomputes a retracted request asks the prefill engine's port",
    ),
)
