"""The environment of the benchmark's episodes: a few turns of random words."""

from __future__ import annotations

from typing import Any

import numpy as np

from launch.rollout.env import Done, Reply, Say

VOCABULARY = (300, 2000)
TURNS, SAID_TOKENS = 4, 24


class Turns:
    """Says random tokens, for four turns."""

    def __init__(self, row: dict[str, Any]) -> None:
        self._random = np.random.default_rng(row["say_seed"])

    async def reply(self, reply: Reply) -> Say | Done:
        if reply.turn + 1 == TURNS:
            return Done(reward=0.0)
        return Say(token_ids=self._random.integers(*VOCABULARY, SAID_TOKENS).tolist())
