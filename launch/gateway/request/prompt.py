"""From a request to token ids and block keys: SGLang tokenises, the hash chain is ours."""

from __future__ import annotations

from typing import Protocol

import msgspec

from common.block import BlockKey, Namespace, block_keys
from common.json import JsonObject
from common.page_hashes import page_hashes
from launch.gateway.errors import BadRequest
from launch.gateway.request.parts import CHAT, OF_EVENTS, Part, PartedRequest

_NOT_FOR_TEMPLATE = {
    *("stream", "stream_options"),  # answered with 501
    *("prompt", "add_special_tokens", "add_generation_prompt"),  # ignored by a chat request
}
"""Fields of a chat request that mean something else to ``/v1/tokenize``."""


class TokenizeEndpoint(Protocol):
    """Of some live engine. The answers are JSON; a ``GatewayError`` is raised."""

    async def tokenize(self, body: JsonObject) -> bytes:
        """``/v1/tokenize``."""

    async def prompt_ids(self, path: str, body: JsonObject) -> bytes:
        """What a route makes of the prompt."""


class _One(msgspec.Struct):
    tokens: list[int]


class _Many(msgspec.Struct):
    tokens: list[list[int]]


async def tokenize(request: PartedRequest, endpoint: TokenizeEndpoint) -> None:
    """Fill in ``token_ids`` of every part that has text; parts of one prompt share a list."""
    if request.path == CHAT:
        await _tokenize_chat(request.parts, endpoint)
        return
    if request.path in OF_EVENTS:
        [part] = request.parts
        if part.token_ids is not None:
            return
        answer = await endpoint.prompt_ids(part.path, part.body | {"stream": False})
        part.token_ids = msgspec.json.decode(answer, type=_One).tokens
        return
    texts = [p.text for p in request.parts[:: request.samples] if p.text is not None]
    if not texts:
        return
    answer = await endpoint.tokenize({"prompt": texts})
    by_text = dict(zip(texts, msgspec.json.decode(answer, type=_Many).tokens, strict=True))
    for part in request.parts:
        if part.text is not None:
            part.token_ids = by_text[part.text]


async def _tokenize_chat(parts: list[Part], endpoint: TokenizeEndpoint) -> None:
    first = parts[0]
    if first.token_ids is None:
        if first.body.get("messages") is None:
            raise BadRequest("messages is missing", "messages")
        body = {k: v for k, v in first.body.items() if k not in _NOT_FOR_TEMPLATE}
        first.token_ids = msgspec.json.decode(await endpoint.tokenize(body), type=_One).tokens
    for part in parts[1:]:
        part.token_ids = first.token_ids


def hit_candidates(part: Part, namespace: Namespace) -> list[BlockKey]:
    """Keys of the full blocks whose KV a store may hold: all that leave a token to compute,
    which is in no pair of tokens that SGLang looks for in its trees either.

    Empty where the KV depends on more than tokens and salts (LoRA adapters), or where a
    token is none (SGLang will say so).
    """
    if part.token_ids is None or part.names_adapter:
        return []
    page_tokens, bigrams = namespace.layout.page_tokens, namespace.layout.bigrams
    reusable_tokens = max(0, len(part.token_ids) - 1 - bigrams) // page_tokens * page_tokens
    try:
        hashes = page_hashes(
            part.token_ids[: reusable_tokens + bigrams],
            page_tokens,
            part.salt("extra_key"),
            part.salt("cache_salt"),
            bigrams,
        )
    except ValueError:  # a negative token id, or a salt that is not UTF-8
        return []
    return block_keys(namespace.digest(), hashes)
