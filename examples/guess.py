"""A text environment of Gymnasium's, for ``--harness 'python -m
launch.rollout.adapters.gymnasium_text'``: guess a number.

    {"prompt": "Guess numbers.", "env": "examples.guess:Guess-v0", "env_args": {"secret": 7}}

is a row of its input. A guess that is right is worth 1, any other one -0.1.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Discrete, Text

HIGHEST = 10
WRONG = -0.1


class Guess(gymnasium.Env[str, np.int64]):
    """Observations are sentences, actions numbers from 1 to :data:`HIGHEST`."""

    def __init__(self, secret: int) -> None:
        self.observation_space = Text(200)
        self.action_space = Discrete(HIGHEST, start=1)
        self._secret = secret

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return f"Which number from 1 to {HIGHEST}?", {}

    def step(self, action: np.int64) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if action == self._secret:
            return "Right.", 1.0, True, False, {}
        way = "more" if action < self._secret else "less"
        return f"It is {way} than {action}.", WRONG, False, False, {}


gymnasium.register("Guess-v0", entry_point="examples.guess:Guess")
