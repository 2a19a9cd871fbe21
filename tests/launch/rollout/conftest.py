"""The stand-in endpoint, for every test of jobs."""

from tests.launch.rollout.stub import stub, stub_server

__all__ = ["stub", "stub_server"]
