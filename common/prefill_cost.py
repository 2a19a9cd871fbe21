"""What a chunk of a prompt costs in a prefill forward, by its cached and its new tokens.

One formula for whoever reckons with it: the engine that fits it and packs batches by it
(``engine/prefill/cost_fit.py``, ``scheduler/quota.py``), and the scheduler, which weighs engines
and what is worth loading (``scheduler/cluster_state.py``).
"""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class PrefillCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Fitted coefficients of a forward's time, none negative.

    Attention is paid for by *pairs* of a new token and a token that it looks at. They have
    three prices, since kernels take other routes with a cached prefix than without: among
    the new tokens of a chunk that has no prefix (``pair_s``), of new tokens with the prefix
    (``pair_s + prefix_pair_s``), among new tokens after a prefix (``pair_s + own_pair_s``).

    These are of the layers that attend to all tokens. Layers with a sliding window have pairs of
    their own (``window_pair_s``), of which a new token has as many as the window is long. What a
    recurrent layer does is alike for each new token, and so is in ``token_s``.
    """

    base_s: float
    """For each forward."""
    token_s: float
    """For each new token."""
    pair_s: float
    request_s: float = 0.0
    """For each request of the batch."""
    context_s: float = 0.0
    """For each cached token: its KV is read, however few tokens are new."""
    prefix_pair_s: float = 0.0
    own_pair_s: float = 0.0
    window_pair_s: float = 0.0
    window_tokens: int = 0
    """Not a coefficient: how far layers with a window look back; 0 without any."""

    @classmethod
    def of(cls, coefficients: Floats, window_tokens: int) -> PrefillCost:
        """The inverse of :meth:`coefficients`."""
        found = dict(zip(TERMS, coefficients.tolist(), strict=True))
        return msgspec.convert({**found, "window_tokens": window_tokens}, cls)

    def coefficients(self) -> Floats:
        """In the order of ``TERMS``, shape (8,)."""
        return np.array(msgspec.structs.astuple(self)[: len(TERMS)], np.float64)

    def batch_s(self, context: ArrayLike, new: ArrayLike) -> float:
        """Time of a whole batch; arrays with an entry for each request."""
        return float(self.coefficients() @ batch_terms(context, new, self.window_tokens))


TERMS = PrefillCost.__struct_fields__[:-1]


def request_terms(context: ArrayLike, new: ArrayLike, window_tokens: ArrayLike = 0) -> Floats:
    """What one request adds to its batch, in units of ``TERMS[1:]``: shape (7, *shape).

    ``context``, ``new``: cached and new tokens, numbers or arrays of one shape; or numbers, where
    ``window_tokens`` has that shape. Each term grows with ``new``.
    """
    new, context = np.asarray(new, np.float64), np.asarray(context, np.float64)
    with_prefix, own = new * context, new * new / 2
    within = _window_pairs(context + new, window_tokens) - _window_pairs(context, window_tokens)
    terms = np.empty((len(TERMS) - 1, *within.shape))  # np.stack takes three times as long
    terms[0] = new
    terms[1] = with_prefix + own
    terms[2] = 1.0
    terms[3] = context
    terms[4] = with_prefix
    terms[5] = own * (context > 0)
    terms[6] = within
    return terms


def _window_pairs(tokens: Floats, window_tokens: ArrayLike) -> Floats:
    """Of the first so many tokens of a prompt, each of which looks at those of one window."""
    nearest = np.minimum(tokens, window_tokens)
    return nearest * (tokens - nearest / 2)


def batch_terms(context: ArrayLike, new: ArrayLike, window_tokens: int = 0) -> Floats:
    """A whole batch in units of ``TERMS``, shape (8,); arrays with an entry for each request."""
    return np.append(1.0, request_terms(context, new, window_tokens).sum(axis=1))
