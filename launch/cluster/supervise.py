"""A supervisor at work, with the logs of its processes shown and kept small."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from common.user_files import close_to_others
from launch.cluster.console import ConsoleReporter
from launch.cluster.log_files import LogFile, keep_small
from launch.cluster.process_record import ProcessRecord
from launch.cluster.supervisor import Numbers, Supervisor
from launch.flags.node import NodeSettings


async def supervise(
    config: NodeSettings,
    records: Sequence[ProcessRecord],
    reporter: ConsoleReporter,
    numbers: Numbers | None = None,
    drain: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Run these until a signal comes. Raises ``StartFailed``."""
    logs = [
        LogFile(config.log_folder / f"{record.name}.log", config.log_bytes, config.log_files)
        for record in records
    ]
    if not config.log_dir:
        close_to_others([config.log_folder])
    for log in logs:
        log.begin()
    followers = [
        asyncio.create_task(reporter.follow_logs([log.path for log in logs])),
        asyncio.create_task(keep_small(logs)),
    ]
    supervisor = Supervisor(
        records,
        config.log_folder,
        reporter,
        config.start_timeout_s,
        config.restart_backoff_max_s,
        numbers,
    )
    supervisor.drain = drain
    try:
        await supervisor.run()
    finally:
        for follower in followers:
            follower.cancel()
