"""Rollout jobs: prompts in, samples for reinforcement learning out."""
