"""What judges a whole group of ``python -m launch.rollout``: a prompt and all of its samples.

    python -m launch.rollout --input examples/calculator.jsonl --output /tmp/groups --n 4 \\
        --env examples.calculator:Calculator --group-reward examples.groups:advantage \\
        --filter examples.groups:is_mixed
"""

from __future__ import annotations

from statistics import mean

from launch.rollout.groups.hooks import WholeGroup


def advantage(group: WholeGroup) -> list[float]:
    """By how much each sample's reward exceeds the mean of its group; no reward counts as 0."""
    rewards = [sample.reward or 0.0 for sample in group.samples]
    return [reward - mean(rewards) for reward in rewards]


def is_mixed(group: WholeGroup) -> bool:
    """Whether the samples differ in their rewards: where they do not, there is nothing to learn."""
    return len({sample.reward for sample in group.samples}) > 1
