"""How long a prefill forward takes, fitted while serving."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from transfer.messages import PrefillCost

FORGET = 0.98
"""Weight of the past at each forward: about the last 50 count."""
SAMPLES_MIN = 3
TOKENS_MIN = 256
"""New tokens that must have been computed before anything is said."""
_RIDGE = 1e-6


class PrefillCostFit:
    """Exponentially forgetting least squares of seconds over (1, tokens, token pairs).

    A term that would come out negative is left out, so an estimate never falls with the
    length of the prompt.
    """

    def __init__(self) -> None:
        self._squares = np.zeros((3, 3))
        self._products = np.zeros(3)
        self._samples = 0
        self._tokens = 0

    def note(
        self, new_tokens: Iterable[int], context_tokens: Iterable[int], seconds: float
    ) -> None:
        """One forward: of each of its requests, the new tokens and those before them."""
        new = np.fromiter(new_tokens, float)
        context = np.fromiter(context_tokens, float)
        terms = np.array([1.0, new.sum(), (new * (context + new / 2)).sum()])
        self._squares = FORGET * self._squares + np.outer(terms, terms)
        self._products = FORGET * self._products + terms * seconds
        self._samples += 1
        self._tokens += int(new.sum())

    def cost(self) -> PrefillCost | None:
        """The present fit; None while too little was measured."""
        if self._samples < SAMPLES_MIN or self._tokens < TOKENS_MIN:
            return None
        # Columns are scaled: pairs are a million times tokens.
        scale = np.sqrt(np.diag(self._squares))
        scale[scale == 0] = 1.0
        squares = self._squares / np.outer(scale, scale) + _RIDGE * np.eye(3)
        products = self._products / scale
        used = [0, 1, 2]
        while used:
            found = np.linalg.solve(squares[np.ix_(used, used)], products[used])
            if (found >= 0).all():
                break
            del used[int(found.argmin())]
        terms = np.zeros(3)
        terms[used] = found / scale[used] if used else 0.0
        return PrefillCost(*terms.tolist())
