"""One client request as the single-prompt, single-sample requests that engines get.

SGLang gives all samples of a request one bootstrap room, which P/D disaggregation
cannot serve, so ``n`` > 1 and lists of prompts are taken apart here and the answers put
together in ``merge_answers``. Bodies have come through ``schema``, so their types are right.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import msgspec

from common.ids import FIELDS_HEADER, INPUT_IDS_HEADER, RECORD_HEADER
from common.json import JsonObject
from common.tracing.spans import NO_SPAN, Span
from launch.gateway.errors import BadRequest

Prompt = str | list[int] | None
"""Text or token ids; None of messages, of which a template makes it."""

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
GENERATE = "/generate"
MESSAGES = "/v1/messages"
"""Anthropic's."""
RESPONSES = "/v1/responses"
"""OpenAI's newer one."""
GENERATING = (CHAT, COMPLETIONS, GENERATE, MESSAGES, RESPONSES)
OF_EVENTS = (MESSAGES, RESPONSES)
"""SGLang's take no token ids: engines make them of what was said, unless a header says that they
are in the body. Their streams are of events with names, of which errors are some."""

DEFAULT_NEW_TOKENS = {CHAT: 512, COMPLETIONS: 16, GENERATE: 128, MESSAGES: 512, RESPONSES: 512}
RESERVED_NEW_TOKENS = 512
"""KV that the decode engine sets aside for an answer (SGLang's own default)."""

_MEDIA_PARTS = {
    *("image", "image_url", "input_image", "document", "input_file"),
    *("audio", "audio_url", "input_audio"),
    *("video", "video_url", "input_video"),
}
_PER_PROMPT = {
    *("sampling_params", "return_logprob", "logprob_start_len", "top_logprobs_num"),
    *("token_ids_logprob", "return_sampling_mask", "extra_key", "cache_salt", "lora_path"),
    "custom_logit_processor",
}
"""Fields of ``/generate`` that may hold a list with one value for each prompt."""


_BESIDE_MESSAGES = ("extra_key", "cache_salt", "priority")


class Part(msgspec.Struct):
    """One prompt, one sample. ``body`` is the client's, reduced to this part."""

    path: str
    body: JsonObject
    rid: str
    index: int
    """Position of its answer among the choices."""
    text: str | None = None
    """The prompt, where it is to be tokenised as plain text."""
    token_ids: list[int] | None = None
    """The tokenised prompt; None until it is known."""
    request_rid: str = ""
    """Of the request that it is a part of."""
    span: Span = NO_SPAN
    """Likewise."""
    no_load: bool = False
    """Nothing of the prompt is read from the store, though it is there."""
    no_store: bool = False
    """Nothing of it, nor of the answer, is kept there."""
    is_recorded: bool = False
    """The answer brings a record of its tokens."""

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def max_new_tokens(self) -> int:
        """KV tokens to count on for the answer."""
        body = self.body
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        if self.path == RESPONSES:
            asked = body.get("max_output_tokens")
        elif self.path == GENERATE:
            params = body.get("sampling_params")
            asked = params.get("max_new_tokens") if isinstance(params, dict) else None
        if not isinstance(asked, int):
            asked = DEFAULT_NEW_TOKENS[self.path]
        return max(0, min(asked, RESERVED_NEW_TOKENS))

    @property
    def priority(self) -> int:
        """SGLang's field."""
        priority = self.body.get("priority")
        return priority if isinstance(priority, int) else 0

    @property
    def names_adapter(self) -> bool:
        """A LoRA adapter: in a field of its own, or in the model's name, as SGLang takes both."""
        return bool(self.body.get("lora_path")) or ":" in str(self.body.get("model") or "")

    def salt(self, field: str) -> str | None:
        """``extra_key`` or ``cache_salt`` as the engine's radix cache will see it."""
        value = self.body.get(field)
        return value if isinstance(value, str) and value else None

    def engine_headers(self, rid: str) -> dict[str, str]:
        """What the engines are told of the request where its body has no place for it."""
        headers = {RECORD_HEADER: "1"} if self.is_recorded else {}
        if self.path in OF_EVENTS and self.body.get("input_ids"):
            headers[INPUT_IDS_HEADER] = "1"
        if self.path == MESSAGES:
            fields = {name: self.body[name] for name in _BESIDE_MESSAGES if name in self.body}
            headers[FIELDS_HEADER] = msgspec.json.encode({**fields, "rid": rid}).decode()
        return headers

    def engine_body(self) -> JsonObject:
        """The body for the engines, with the token ids in place of the prompt."""
        body = dict(self.body)
        if self.token_ids is None:
            return body
        if self.path in OF_EVENTS:
            pass  # those of its client are there; others the engines make of the same messages
        elif self.path == CHAT:
            body["input_ids"] = self.token_ids
        elif self.path == COMPLETIONS:
            # SGLang echoes the prompt as it was given: ids would come back without
            # their special tokens.
            if not body.get("echo"):
                body["prompt"] = self.token_ids
        else:
            body.pop("text", None)
            body["input_ids"] = self.token_ids
        return body


class PartedRequest(msgspec.Struct, frozen=True):
    """All parts of one client request. ``samples`` parts share a prompt."""

    path: str
    rid: str
    body: JsonObject
    """As the client sent it."""
    parts: list[Part]
    samples: int
    merged: bool
    """Whether the answers need merging, or the only one is returned as it is."""


def split_request(path: str, body: JsonObject, parts_max: int) -> PartedRequest:
    """Take a request apart; raises :class:`BadRequest`."""
    refuse_media(body)
    body = dict(body)
    no_load, no_store, is_recorded = (
        bool(body.pop(name, None)) for name in ("no_load", "no_store", "return_turn_record")
    )
    prompts = _prompts(path, body)
    samples = _samples(path, body)
    count = len(prompts) * samples
    if count > parts_max:
        raise BadRequest(f"{count} answers asked for in one request; at most {parts_max}")
    if is_recorded and count > 1:
        raise BadRequest("return_turn_record goes with one answer a request: n is 1.", "n")
    rid, names = _rids(body.get("request_id" if path == RESPONSES else "rid"), count)
    if path == RESPONSES and not body.get("request_id"):
        rid = f"resp_{rid}"  # the answer's id, by which its clients know it
    parts = []
    for index in range(count):
        part = _part(path, body, prompts, index // samples)
        part.index, part.request_rid = index, rid
        part.no_load, part.no_store, part.is_recorded = no_load, no_store, is_recorded
        # As SGLang names the parts of a request; its engines know other ids.
        part.rid = names[index] if names else rid if count == 1 else f"{rid}_{index}"
        parts.append(part)
    listed = path == GENERATE and (samples > 1 or _is_list_of_prompts(body))
    return PartedRequest(path, rid, body, parts, samples, merged=count > 1 or listed)


def _rids(given: object, count: int) -> tuple[str, list[str]]:
    """The whole request's id, and those of its parts where the client names each."""
    if isinstance(given, list) and given:
        if len(given) != count:
            raise BadRequest(f"rid: {len(given)} ids for {count} answers.", "rid")
        return uuid.uuid4().hex, given
    return (given if isinstance(given, str) and given else uuid.uuid4().hex), []


def refuse_media(body: JsonObject) -> None:
    """Images, audio and video have no place in a store keyed by token ids."""
    for messages in ("messages", "input", "system"):
        for message in _objects(body.get(messages)):
            for part in (message, *_content(message), *_objects(message.get("output"))):
                for inner in (part, *_content(part)):  # of a tool's result
                    _refuse_if_media(inner.get("type"))


def _content(message: JsonObject) -> list[JsonObject]:
    return _objects(message.get("content"))


def _objects(value: object) -> list[JsonObject]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _refuse_if_media(kind: object) -> None:
    if isinstance(kind, str) and kind in _MEDIA_PARTS:
        raise BadRequest(
            f"Content of type '{kind}' is not supported: this cluster serves text only."
        )


def _samples(path: str, body: JsonObject) -> int:
    params = body.get("sampling_params") if path == GENERATE else body
    several = params if isinstance(params, list) else [params]
    counts = {one.get("n") or 1 if isinstance(one, dict) else 1 for one in several}
    if len(counts) > 1:
        raise BadRequest("n must be the same for all prompts of a request.", "n")
    [n] = counts or {1}
    assert isinstance(n, int)
    return n


def _is_list_of_prompts(body: JsonObject) -> bool:
    prompt = body.get("text") if body.get("text") is not None else body.get("input_ids")
    return isinstance(prompt, list) and isinstance(prompt[0], str | list)


def _prompts(path: str, body: JsonObject) -> Sequence[Prompt]:
    if path == CHAT or path in OF_EVENTS:
        ids = body.get("input_ids")
        return [ids if isinstance(ids, list) and ids else None]
    name = "prompt"
    if path == GENERATE:
        name = "text" if body.get("text") is not None else "input_ids"
    prompt = body.get(name)
    if isinstance(prompt, str) and prompt:
        return [prompt]
    if isinstance(prompt, list) and prompt:
        several = prompt if isinstance(prompt[0], str | list) else [prompt]
        kind = type(several[0])
        if all(type(one) is kind and one for one in several):
            return several
    raise BadRequest(
        f"{name} must be a text, a list of token ids, or a list of one kind of these; none empty.",
        name,
    )


def _part(path: str, body: JsonObject, prompts: Sequence[Prompt], which: int) -> Part:
    prompt = prompts[which]
    reduced = {k: v for k, v in body.items() if k not in ("n", "rid", "request_id")}
    if path == COMPLETIONS:
        reduced["prompt"] = prompt
    elif path == GENERATE:
        _reduce_generate(reduced, prompt, len(prompts), which)
    return Part(
        path=path,
        body=reduced,
        rid="",
        index=0,
        text=prompt if isinstance(prompt, str) else None,
        token_ids=prompt if isinstance(prompt, list) else None,
    )


def _reduce_generate(body: JsonObject, prompt: Prompt, count: int, which: int) -> None:
    listed = _is_list_of_prompts(body)
    body["text" if isinstance(prompt, str) else "input_ids"] = prompt
    for field in _PER_PROMPT & body.keys():
        value = body[field]
        # token_ids_logprob may also be one flat list, meant for every prompt
        if not isinstance(value, list) or (field == "token_ids_logprob" and not _nested(value)):
            continue
        if not listed or len(value) != count:
            raise BadRequest(
                f"{field} is a list of {len(value)}, which goes with a list of as many prompts.",
                field,
            )
        body[field] = value[which]
    params = body.get("sampling_params")
    if isinstance(params, dict):
        body["sampling_params"] = {k: v for k, v in params.items() if k != "n"}


def _nested(value: list[object]) -> bool:
    return bool(value) and isinstance(value[0], list)
