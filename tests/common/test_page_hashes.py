"""The page hash chain is SGLang's own, whatever the salts."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.page_hashes import BadToken, continue_chain, namespace_seed, page_hashes
from tests.examples import examples

sglang_utils = pytest.importorskip("sglang.srt.mem_cache.utils")
radix_cache = pytest.importorskip("sglang.srt.mem_cache.radix_cache")

KEYS = st.one_of(st.none(), st.text(max_size=20))


class _RadixKey:
    """What SGLang hashes: tokens with the request's two keys beside them."""

    def __init__(self, token_ids: list[int], extra_key: str | None, cache_salt: str | None):
        self.token_ids = token_ids
        self.extra_key = extra_key
        self.cache_salt = cache_salt

    def __len__(self) -> int:
        return len(self.token_ids)


def sglang_hashes(
    token_ids: list[int], page_tokens: int, extra_key: str | None, cache_salt: str | None
) -> list[bytes]:
    key = _RadixKey(token_ids, extra_key, cache_salt)
    return [
        bytes.fromhex(page) for page in sglang_utils.get_storage_hash_str(key, None, page_tokens)
    ]


@given(
    pages=st.integers(0, 6),
    rest=st.integers(0, 15),
    page_tokens=st.sampled_from([16, 64]),
    extra_key=KEYS,
    cache_salt=KEYS,
    seed=st.integers(0, 2**32),
)
@examples(60)
def test_equals_sglang(
    pages: int,
    rest: int,
    page_tokens: int,
    extra_key: str | None,
    cache_salt: str | None,
    seed: int,
) -> None:
    rng = random.Random(seed)
    token_ids = [rng.randrange(2**32) for _ in range(pages * page_tokens)]
    tail = [rng.randrange(2**32) for _ in range(rest)]
    ours = page_hashes(token_ids + tail, page_tokens, extra_key, cache_salt)
    theirs = sglang_hashes(token_ids, page_tokens, extra_key, cache_salt)
    assert ours == theirs


@given(pages=st.integers(0, 6), rest=st.integers(1, 16), salt=KEYS, seed=st.integers(0, 2**32))
@examples(60)
def test_bigrams_equal_those_of_sglangs_trees_under_a_draft(pages, rest, salt, seed) -> None:
    tokens = [random.Random(seed).randrange(2**32) for _ in range(pages * 16 + rest)]
    view, _ = radix_cache.RadixKey(array("q", tokens), cache_salt=salt).maybe_to_bigram_view(True)
    theirs = sglang_utils.get_storage_hash_str(view.page_aligned(16), None, 16)
    ours = page_hashes(tokens, 16, cache_salt=salt or None, bigrams=True)
    assert ours == [bytes.fromhex(page) for page in theirs] and len(ours) == pages


def test_a_page_of_bigrams_depends_on_the_token_behind_it() -> None:
    tokens = list(range(17))
    assert page_hashes(tokens[:16], 16, bigrams=True) == []
    other = page_hashes([*tokens[:16], 99], 16, bigrams=True)
    assert page_hashes(tokens, 16, bigrams=True) != other
    first = page_hashes(range(33), 16, bigrams=True)
    assert first[1:] == continue_chain(first[0], range(16, 33), 16, bigrams=True)


@given(split=st.integers(0, 8), salt=KEYS)
@examples()
def test_chain_can_be_continued(split: int, salt: str | None) -> None:
    tokens = list(range(8 * 16))
    first = continue_chain(namespace_seed(None, salt), tokens[: split * 16], 16)
    prior = first[-1] if first else namespace_seed(None, salt)
    assert first + continue_chain(prior, tokens[split * 16 :], 16) == page_hashes(
        tokens, 16, cache_salt=salt
    )


def test_tenants_never_share() -> None:
    tokens = list(range(64))
    chains = {
        tuple(page_hashes(tokens, 64, extra_key, cache_salt))
        for extra_key, cache_salt in [(None, None), ("a", None), (None, "a"), ("a", "a")]
    }
    assert len(chains) == 4


@pytest.mark.parametrize("token", [-1, 2**32, "x"])
def test_refuses_what_is_no_token(token: object) -> None:
    with pytest.raises(BadToken):
        page_hashes([token] * 64, 64)  # type: ignore[list-item]
