"""``python -m launch.cluster``: one command serves a model from engines, agents and store.

Exit codes: 0 after SIGINT or SIGTERM; 1 when a process did not start; 2 for a setting
that cannot work (the reason is one sentence on stderr).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

from launch.cluster import preflight
from launch.cluster.config import ClusterConfig, load_config
from launch.cluster.console import ConsoleReporter, gateway_url, make_summary
from launch.cluster.hardware import detect
from launch.cluster.processes import process_records
from launch.cluster.supervise import supervise
from launch.cluster.supervisor import StartFailed
from launch.flags.ray import check_installed
from launch.models.resolve import resolve_model
from launch.settings import BadConfig, help_markdown


def main(argv: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    if "--help-markdown" in argv:
        print(help_markdown(ClusterConfig))
        return 0
    try:
        config = load_config(argv)
        if config.ray:
            return _drive(config)
        hardware = detect(config)
        model = resolve_model(config.model)
        records = process_records(config, model, hardware)
        locks = preflight.check(config, records)
    except BadConfig as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    url = gateway_url(config)
    reporter = ConsoleReporter(config, f"serving at {url} (OpenAI API: {url}/v1); Ctrl-C ends it")
    reporter.console.print(make_summary(config, hardware, model, records))
    try:
        asyncio.run(supervise(config, records, reporter))
    except StartFailed as error:
        reporter.failed(str(error), error.log)
        return 1
    finally:
        for lock in locks:
            lock.close()
    return 0


def _drive(config: ClusterConfig) -> int:
    check_installed()
    from launch.ray.driver import drive

    return drive(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
