"""How long a prefill forward takes, or the attention in it: fitted while serving.

Starts from a profile where one was taken (``engine/prefill/profile.py``).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from common.prefill_cost import TERMS, Floats, PrefillCost, batch_terms

FORGET = 0.98
"""Weight of the past at each forward: about the last 50 count."""
SAMPLES_MIN = 3
TOKENS_MIN = 256
"""New tokens that must have been computed before anything is said."""
JITTER_S = 0.01
SURPRISE_MAX = 2.0
"""With a profile, a forward counts as so many times its estimate at most: one that was held up
spoils little, and an engine that has become slower is still followed."""
_RIDGE = np.array([1e-6, 1e-6, 1e-6, 1e-5, 1e-5, 1e-4, 1e-4, 1e-5])
"""Without a profile: of terms that the traffic does not tell apart, the first ones pay."""
_PROFILE_WEIGHT = 0.02
"""With one: terms that the traffic tells apart by less than this keep the profile's ratio."""


def relative(seconds: float) -> float:
    """Weight by which an error counts relatively, if the time is long beside the jitter."""
    return 1 / (seconds + JITTER_S)


class CostFit:
    """Exponentially forgetting least squares over the terms of a forward.

    A term that would come out negative is left out, so an estimate never falls with a length.
    Traffic alone seldom tells all terms apart. With a profile it corrects the level, and the
    shape only as far as it shows another one.
    """

    def __init__(self, profile: PrefillCost | None = None, window_tokens: int = 0) -> None:
        """``window_tokens``: of layers with a sliding window, 0 without any."""
        self._window_tokens = window_tokens
        self._squares = np.zeros((len(TERMS), len(TERMS)))
        self._products = np.zeros(len(TERMS))
        self._profile = None if profile is None else profile.coefficients()
        self._samples = 0
        self._tokens = 0
        self._cost = profile

    def note(
        self,
        new_tokens: Iterable[int],
        context_tokens: Iterable[int],
        seconds: float,
        weight: float | None = None,
    ) -> None:
        """One forward: of each of its requests, the new tokens and the cached before them.

        ``weight`` is that of its error; by default one over what the profile expects.
        """
        new = np.fromiter(new_tokens, float)
        row = batch_terms(np.fromiter(context_tokens, float), new, self._window_tokens)
        if self._profile is not None and (cost := self.cost()) is not None:
            expected_s = float(cost.coefficients() @ row)
            seconds = min(seconds, SURPRISE_MAX * expected_s + JITTER_S)
        if weight is None:
            # Not one over what was measured: that would favour the times when it was fast.
            weight = 1.0 if self._profile is None else relative(float(self._profile @ row))
        row *= weight
        self._squares = FORGET * self._squares + np.outer(row, row)
        self._products = FORGET * self._products + row * (weight * seconds)
        self._samples += 1
        self._tokens += int(new.sum())
        self._cost = None

    def cost(self) -> PrefillCost | None:
        """The present fit; None while there is no profile and too little was measured."""
        if self._cost is None and self._is_known():
            self._cost = PrefillCost.of(self._solve(), self._window_tokens)
        return self._cost

    def _is_known(self) -> bool:
        enough = self._samples >= SAMPLES_MIN and self._tokens >= TOKENS_MIN
        return enough or self._profile is not None

    def _solve(self) -> Floats:
        # Columns are scaled: pairs are a million times tokens.
        scale = np.sqrt(np.diag(self._squares))
        scale[scale == 0] = 1.0
        squares, products = self._squares / np.outer(scale, scale), self._products / scale
        if self._profile is None:
            ridge, toward = _RIDGE, np.zeros(len(TERMS))
        else:
            ridge, toward = np.full(len(TERMS), _PROFILE_WEIGHT), self._level() * self._profile
        squares = squares + np.diag(ridge)
        products = products + ridge * toward * scale
        used = list(range(len(TERMS)))
        found = np.zeros(0)
        while used:
            found = np.linalg.solve(squares[np.ix_(used, used)], products[used])
            if (found >= 0).all():
                break
            del used[int(found.argmin())]
        solved = np.zeros(len(TERMS))
        solved[used] = found / scale[used] if used else 0.0
        return solved

    def _level(self) -> float:
        """By how much forwards take longer than the profile says."""
        assert self._profile is not None
        squares = self._profile @ self._squares @ self._profile
        return float(self._profile @ self._products / squares) if squares > 0 else 1.0
