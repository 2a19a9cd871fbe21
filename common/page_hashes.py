"""SGLang's page hash chain, without SGLang: what names a page of tokens.

The same digests as ``sglang.srt.mem_cache.utils.get_storage_hash_str`` gives the
radix cache (a test compares them), so that the gateway, which loads no SGLang, and
the engine agree on every block key. SGLang turns an empty ``extra_key`` or
``cache_salt`` of a request into None before it hashes: callers do the same.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable

_TOKEN_BYTES = 4


class BadToken(ValueError):
    """A token id that is no unsigned 32-bit integer; no text model has one."""


def namespace_seed(extra_key: str | None, cache_salt: str | None) -> bytes | None:
    """What the chain of a tenant starts from: 32 bytes, or None without either key."""
    if extra_key is None and cache_salt is None:
        return None
    digest = hashlib.sha256(b"sglang-cache-namespace-v1")
    for part in (extra_key, cache_salt):
        if part is None:
            digest.update(b"\x00")
            continue
        encoded = part.encode()
        digest.update(b"\x01" + len(encoded).to_bytes(8, "little") + encoded)
    return digest.digest()


def continue_chain(
    prior: bytes | None, token_ids: Iterable[int], page_tokens: int, bigrams: bool = False
) -> list[bytes]:
    """32-byte hashes of the full pages in ``token_ids``, which follow a page hashed ``prior``.

    ``prior`` is the seed (or None) at the start of a prompt. A partial last page is left out.
    ``bigrams``: each token counts with the next one, so that the last page is full with one
    token more. Raises :class:`BadToken`.
    """
    try:
        words = array("I", token_ids)
    except (OverflowError, TypeError) as error:
        raise BadToken(str(error)) from error
    if sys.byteorder != "little":
        words.byteswap()
    page_bytes = page_tokens * _TOKEN_BYTES
    if bigrams:
        pairs = words[:-1] * 2
        pairs[::2], pairs[1::2] = words[:-1], words[1:]
        words, page_bytes = pairs, 2 * page_bytes
    tokens = memoryview(words).cast("B")
    hashes = []
    for start in range(0, len(tokens) - page_bytes + 1, page_bytes):
        digest = hashlib.sha256(prior or b"")
        digest.update(tokens[start : start + page_bytes])
        prior = digest.digest()
        hashes.append(prior)
    return hashes


def page_hashes(
    token_ids: Iterable[int],
    page_tokens: int,
    extra_key: str | None = None,
    cache_salt: str | None = None,
    bigrams: bool = False,
) -> list[bytes]:
    """32-byte hashes of the full pages of a prompt, in order, as of :func:`continue_chain`."""
    return continue_chain(namespace_seed(extra_key, cache_salt), token_ids, page_tokens, bigrams)
