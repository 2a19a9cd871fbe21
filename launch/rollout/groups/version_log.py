"""In which order the weights' versions were served, as far as a job has seen: how stale a token is.

A version is a label of the trainer's. The job learns of one by answers, whose spans name them in
order, and by asking which is served. What is served again after others is the newest again.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from launch.rollout.answers import Span
from launch.rollout.output.schema import Sample, trajectories


class VersionLog:
    """Kept in a file (a JSON list, oldest first): samples may outlast a run."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.versions: list[str] = []
        if path.exists():
            self.versions = msgspec.json.decode(path.read_bytes(), type=list[str])

    def served(self, version: str) -> None:
        """It is served now."""
        if self.versions[-1:] != [version]:
            self.versions = [v for v in self.versions if v != version] + [version]
            self._save()

    def heard(self, spans: Sequence[Span]) -> None:
        """The versions of one answer, in order. One that is new, and that none known follows, is
        the newest until :meth:`served` says otherwise."""
        known = len(self.versions)
        following = len(self.versions)
        for span in reversed(spans):
            if span.version in self.versions:
                following = self.versions.index(span.version)
            else:
                self.versions.insert(following, span.version)
        if len(self.versions) > known:
            self._save()

    def behind_commits(self, version: str) -> int:
        """How many commits after it the weights are that are served now."""
        return len(self.versions) - 1 - self.versions.index(version)

    def staleness_commits(self, samples: Iterable[Sample]) -> int:
        """Of the oldest token in them; 0 where there are no tokens."""
        everything = [one for sample in samples for one in trajectories(sample)]
        versions = {span.version for one in everything for span in one.versions}
        return max((self.behind_commits(version) for version in versions), default=0)

    def _save(self) -> None:
        scratch = self._path.with_suffix(".part")
        scratch.write_bytes(msgspec.json.encode(self.versions))
        os.replace(scratch, self._path)
