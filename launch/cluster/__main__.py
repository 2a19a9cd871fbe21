"""``python -m launch.cluster``: one command serves a model from engines, agents and store.

Exit codes: 0 after SIGINT or SIGTERM; 1 when a process did not start; 2 for a setting
that cannot work (the reason is one sentence on stderr).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from common.user_files import close_to_others
from launch.cluster import preflight
from launch.cluster.config import ClusterConfig, load_config
from launch.cluster.console import ConsoleReporter, make_summary
from launch.cluster.hardware import detect
from launch.cluster.log_files import LogFile, keep_small
from launch.cluster.process_record import ProcessRecord
from launch.cluster.processes import process_records
from launch.cluster.supervisor import StartFailed, Supervisor
from launch.models.resolve import resolve_model
from launch.settings import BadConfig, help_markdown


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    if "--help-markdown" in argv:
        print(help_markdown(ClusterConfig))
        return 0
    try:
        config = load_config(argv)
        hardware = detect(config)
        model = resolve_model(config.model)
        records = process_records(config, model, hardware)
        locks = preflight.check(config, records)
    except BadConfig as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reporter = ConsoleReporter(config)
    reporter.console.print(make_summary(config, hardware, model, records))
    try:
        asyncio.run(_supervise(config, records, reporter))
    except StartFailed as error:
        reporter.failed(str(error), error.log)
        return 1
    finally:
        for lock in locks:
            lock.close()
    return 0


async def _supervise(
    config: ClusterConfig, records: list[ProcessRecord], reporter: ConsoleReporter
) -> None:
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
    )
    try:
        await supervisor.run()
    finally:
        for follower in followers:
            follower.cancel()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
