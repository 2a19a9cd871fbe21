"""What a run has done, counted."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from launch.rollout.answers import Generation
from launch.rollout.output.schema import Sample
from launch.rollout.slots import Utilisation


class Progress(msgspec.Struct):
    """Counted from the start of this run; ``done_before`` are earlier runs' samples, dropped ones
    too."""

    samples: int
    done_before: int
    done: int = 0
    failed: int = 0
    """Episodes that ended with an error; they are samples all the same."""
    missing: int = 0
    """Samples that could not be had: see errors.jsonl."""
    dropped: int = 0
    """Samples of groups that were stale, or that the filter did not want."""
    groups: int = 0
    """That were whole, and written."""
    aborted: int = 0
    """Episodes that were ended since they were not needed any more."""
    continued: int = 0
    """Requests that go on with an unfinished answer."""
    requests: int = 0
    primes: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    read_bytes: int = 0

    def count(self, samples: Sequence[Sample]) -> None:
        """They are in the output."""
        self.done += len(samples)
        self.failed += sum(sample.error is not None for sample in samples)

    def answered(self, prompt_tokens: int, answer: Generation, continues: bool) -> None:
        self.requests += 1
        self.continued += continues
        self.generated_tokens += len(answer.token_ids)
        self.prompted(prompt_tokens, answer.cached_tokens, answer.read_bytes)

    def prompted(self, prompt_tokens: int, cached_tokens: int, read_bytes: int) -> None:
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.read_bytes += read_bytes


class Summary(Progress, kw_only=True):
    """A run that has ended, for people and for ``summary.json``."""

    failed_before: int
    seconds: float
    generated_tokens_per_s: float
    hit_rate: float
    retries: int
    refused_429: int
    concurrency: int
    utilisation: Utilisation
