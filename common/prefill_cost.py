"""What a chunk of a prompt costs in a prefill forward, by its cached and its new tokens.

One formula for whoever reckons with it: the engine that fits it and packs batches by it
(``engine/prefill/cost_fit.py``, ``scheduler/quota.py``), and the scheduler, which weighs engines
and what is worth loading (``scheduler/cluster_state.py``).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]

TERMS = (
    "base_s",
    "request_s",
    "token_s",
    "context_s",
    "pair_s",
    "prefix_pair_s",
    "own_pair_s",
)


class ForwardCost(Protocol):
    """Fitted coefficients, none negative: ``PrefillCost`` in common/messages.py.

    Attention is paid for by *pairs* of a new token and a token that it looks at. They have
    three prices, since kernels take other routes with a cached prefix than without: among
    the new tokens of a chunk that has no prefix (``pair_s``), of new tokens with the prefix
    (``pair_s + prefix_pair_s``), among new tokens after a prefix (``pair_s + own_pair_s``).
    """

    @property
    def base_s(self) -> float:
        """For each forward."""

    @property
    def request_s(self) -> float:
        """For each request of the batch."""

    @property
    def token_s(self) -> float:
        """For each new token."""

    @property
    def context_s(self) -> float:
        """For each cached token: its KV is read, however few tokens are new."""

    @property
    def pair_s(self) -> float: ...
    @property
    def prefix_pair_s(self) -> float: ...
    @property
    def own_pair_s(self) -> float: ...


def coefficients(cost: ForwardCost) -> Floats:
    """In the order of ``TERMS``, shape (7,)."""
    return np.array([getattr(cost, name) for name in TERMS])


def request_terms(context: Any, new: Any) -> Floats:
    """What one request adds to its batch, in units of ``TERMS[1:]``: shape (6, *shape).

    ``context``, ``new``: cached and new tokens, numbers or arrays of one shape. Each term
    grows with ``new``.
    """
    new, context = np.broadcast_arrays(np.asarray(new, float), np.asarray(context, float))
    with_prefix, own = new * context, new * new / 2
    pairs = with_prefix + own
    return np.stack([np.ones(new.shape), new, context, pairs, with_prefix, own * (context > 0)])


def batch_terms(context: Any, new: Any) -> Floats:
    """A whole batch in units of ``TERMS``, shape (7,); arrays with an entry for each request."""
    return np.append(1.0, request_terms(context, new).sum(axis=1))
