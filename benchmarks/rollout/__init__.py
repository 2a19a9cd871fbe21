"""A rollout job beside a bare loop of requests."""
