"""Progress of long work on stderr, and the threads that do it."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

T = TypeVar("T")
R = TypeVar("R")
THREADS = 8


@contextlib.contextmanager
def progress_bar(label: str, total: int, is_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """Call what it gives with each bit of progress."""
    amount = (DownloadColumn(), TransferSpeedColumn()) if is_bytes else (MofNCompleteColumn(),)
    columns = TextColumn(label), BarColumn(), *amount, TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.update(task, advance=amount)


def in_threads(work: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> Iterator[R]:
    """Results in the order of the items, a bounded number of which is under way."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[R]] = deque()
        try:
            for item in items:
                running.append(pool.submit(work, item))
                if len(running) >= 4 * threads:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
