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


class PrefillCost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Fitted coefficients of a forward's time, none negative.

    Attention is paid for by *pairs* of a new token and a token that it looks at. They have
    three prices, since kernels take other routes with a cached prefix than without: among
    the new tokens of a chunk that has no prefix (``pair_s``), of new tokens with the prefix
    (``pair_s + prefix_pair_s``), among new tokens after a prefix (``pair_s + own_pair_s``).
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

    def coefficients(self) -> Floats:
        """In the order of ``TERMS``, shape (7,)."""
        return np.array(msgspec.structs.astuple(self), np.float64)

    def batch_s(self, context: ArrayLike, new: ArrayLike) -> float:
        """Time of a whole batch; arrays with an entry for each request."""
        return float(self.coefficients() @ batch_terms(context, new))


TERMS = PrefillCost.__struct_fields__


def request_terms(context: ArrayLike, new: ArrayLike) -> Floats:
    """What one request adds to its batch, in units of ``TERMS[1:]``: shape (6, *shape).

    ``context``, ``new``: cached and new tokens, numbers or arrays of one shape. Each term
    grows with ``new``.
    """
    new, context = np.asarray(new, np.float64), np.asarray(context, np.float64)
    with_prefix, own = new * context, new * new / 2
    terms = np.empty((len(TERMS) - 1, *with_prefix.shape))  # np.stack takes three times as long
    terms[0] = new
    terms[1] = with_prefix + own
    terms[2] = 1.0
    terms[3] = context
    terms[4] = with_prefix
    terms[5] = own * (context > 0)
    return terms


def batch_terms(context: ArrayLike, new: ArrayLike) -> Floats:
    """A whole batch in units of ``TERMS``, shape (7,); arrays with an entry for each request."""
    return np.append(1.0, request_terms(context, new).sum(axis=1))
