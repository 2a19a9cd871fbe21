"""How requests and jobs fail."""

from __future__ import annotations


class RequestFailed(Exception):
    """A request that will not be sent again: its sample is missing, the job goes on."""


class JobStopped(Exception):
    """The job cannot go on. What was acknowledged is kept; the same command goes on later."""


class DiskFull(JobStopped):
    """A sample or a shard could not be written."""


class EndpointGone(JobStopped):
    """For ``--retry-s`` no request succeeded at all."""
