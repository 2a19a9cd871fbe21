"""What a job shows: a bar on a terminal, a line now and then elsewhere, a summary."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from common.sizes import format_size
from launch.rollout.job import Job
from launch.rollout.progress import Summary

SHOW_S = 0.5
LINE_S = 10.0


class Bar:
    """Shows a job that runs. Use as a context."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begun_s = time.monotonic()
        self._line_s = self._begun_s
        columns = TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        text = TextColumn("{task.fields[text]}")
        self._progress = Progress(
            *columns,
            TextColumn("ETA"),
            TimeRemainingColumn(elapsed_when_finished=False),
            text,
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, text="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, job: Job) -> None:
        progress = job.progress
        ended_now = progress.done + progress.dropped + progress.missing
        ended = progress.done_before + ended_now
        now = time.monotonic()
        rate = progress.generated_tokens / max(now - self._begun_s, 1e-3)
        hit = progress.cached_tokens / max(progress.prompt_tokens, 1)
        failures = progress.failed + progress.missing
        text = f"{rate:,.0f} tokens/s, hit rate {hit:.1%}, {failures} failed"
        self._progress.update(self._task, total=progress.samples, completed=ended, text=text)
        if not self._console.is_terminal and now - self._line_s >= LINE_S:
            self._line_s = now
            left = progress.samples - ended
            eta_s = left * (now - self._begun_s) / ended_now if ended_now else math.inf
            self._console.print(
                f"{ended} of {progress.samples} samples, {text}, ETA {eta_s:.0f} s", markup=False
            )


def summary_table(summary: Summary, output: str) -> Table:
    """The end of a run, in rows."""
    table = Table("", "", title=f"Rollout into {output}", title_justify="left", show_header=False)
    use = summary.utilisation
    done = summary.done_before + summary.done
    for name, text in (
        ("samples", f"{done:,} of {summary.samples:,} ({summary.done:,} in this run)"),
        ("groups", f"{summary.groups:,} whole ones; {summary.dropped:,} samples of others dropped"),
        ("failed episodes", f"{summary.failed + summary.failed_before:,}"),
        ("missing samples", f"{summary.missing:,}"),
        ("time", f"{summary.seconds:,.1f} s"),
        ("generated", f"{summary.generated_tokens:,} tokens"),
        ("tokens/s", f"{summary.generated_tokens_per_s:,.1f}"),
        ("prompts", f"{summary.prompt_tokens:,} tokens, {summary.hit_rate:.1%} hits"),
        ("read from storage", format_size(summary.read_bytes)),
        ("requests", f"{summary.requests:,}, and {summary.primes:,} for shared prompts"),
        ("aborted", f"{summary.aborted:,} episodes; {summary.continued:,} answers continued"),
        ("sent again", f"{summary.retries:,}; {summary.refused_429:,} refused as full"),
        ("in flight", f"{use.mean_share:.1%} of {summary.concurrency} on average"),
        ("as many as could be", f"{use.full_share:.1%} of the time"),
    ):
        table.add_row(name, text)
    return table
