"""Gymnasium's text environments: ``--harness 'python -m launch.rollout.adapters.gymnasium_text'``.

A row has ``env``, an id of Gymnasium's (``module:Name-v0`` imports the module first), and may have
``env_args`` (a dict) and ``seed``. Observations are text; an action is what the model says, or,
where actions are numbers, the last one in it. The reward is the sum of all.
"""

from __future__ import annotations

import re
import sys

import gymnasium
from gymnasium.spaces import Discrete, Text

from common.json import JsonObject
from launch.rollout.adapters.chat import Chat, Over, finish, row


def main() -> int:
    """Play the row's environment to its end."""
    finish(play(row()))
    return 0


def play(fields: JsonObject) -> float:
    """Returns the sum of the rewards."""
    given = fields.get("env_args")
    env: gymnasium.Env[object, object] = gymnasium.make(
        str(fields["env"]), **(given if isinstance(given, dict) else {})
    )
    chat, total, seed = Chat(fields), 0.0, fields.get("seed")
    try:
        seen, _ = env.reset(seed=seed if isinstance(seed, int) else None)
        is_over = False
        while not is_over:
            action = _action(env, chat, _text(seen))
            seen, reward, is_done, is_cut, _ = env.step(action)
            total += float(reward)
            is_over = is_done or is_cut
    except Over:  # what it has so far counts
        pass
    finally:
        env.close()
    return total


def _action(env: gymnasium.Env[object, object], chat: Chat, text: str) -> object:
    """What the model does; it is asked again until that is something."""
    space = env.action_space
    while True:
        said = chat.say(text)
        if isinstance(space, Text):
            return said.strip()
        if not isinstance(space, Discrete):
            raise TypeError(f"actions are {space}; give an environment of text or numbers")
        numbers = [int(number) for number in re.findall(r"-?\d+", said)]
        first, count = int(space.start), int(space.n)
        if numbers and first <= numbers[-1] < first + count:
            return numbers[-1]
        text = f"Answer with a number from {first} to {first + count - 1}."


def _text(seen: object) -> str:
    if isinstance(seen, str):
        return seen
    raise TypeError(f"it shows a {type(seen).__name__}; give an environment of text")


if __name__ == "__main__":
    sys.exit(main())
