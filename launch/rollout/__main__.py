"""``python -m launch.rollout``: prompts in, samples for reinforcement learning out.

Exit codes: 0 when every sample is there; 1 when the job stopped before its end (disk full,
endpoint gone); 2 for a setting that cannot work; 3 when the job is through, but rows or
episodes failed (``_job/errors.jsonl``, column ``error``); 130 after SIGINT or SIGTERM. After 1
and 130 the same command goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence

import msgspec
from rich.console import Console

from launch.rollout.config import RolloutConfig, help_markdown, load_config
from launch.rollout.console import SHOW_S, Bar, summary_table
from launch.rollout.dry_run import dry_run
from launch.rollout.errors import DiskFull, JobStopped, RequestFailed
from launch.rollout.input.files import BadInput
from launch.rollout.job import Job, errors_path, until_done
from launch.rollout.output.job_folder import JobFolder
from launch.rollout.output.shards import Output
from launch.rollout.own_cluster import own_cluster
from launch.rollout.progress import Summary
from launch.rollout.recording.passing_client import PassingClient
from launch.rollout.recording.server import RecordingServer
from launch.settings import BadConfig

STOPPED, BAD_SETTING, WITH_FAILURES, INTERRUPTED = 1, 2, 3, 130


def main(argv: Sequence[str]) -> int:
    """Run one job; returns the exit code."""
    if "--help-markdown" in argv:
        print(help_markdown())
        return 0
    sys.path.insert(0, os.getcwd())  # --env may name a module there
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        config = load_config(argv)
        level = "WARNING" if config.log_level == "none" else config.log_level.upper()
        form = "%(asctime)s %(levelname)s %(name)s %(message)s"
        logging.basicConfig(level=level, format=form)
        if config.dry_run:
            return asyncio.run(dry_run(config, console))
        folder = JobFolder(config)
    except (BadConfig, BadInput, RequestFailed) as error:
        return _say(console, BAD_SETTING, f"error: {error}")
    except OSError as error:
        return _say(console, BAD_SETTING, f"error: {error.filename}: {error.strerror}")
    try:
        return asyncio.run(_run(config, folder, console))
    except BadConfig as error:
        return _say(console, BAD_SETTING, f"error: {error}")
    except (RequestFailed, JobStopped) as error:
        again = "Every finished sample is kept: the same command goes on from here."
        return _say(console, STOPPED, f"error: {error}. {again}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        again = "Stopped; every finished sample is kept: the same command goes on from here."
        return _say(console, INTERRUPTED, again)
    finally:
        folder.close()


def _say(console: Console, code: int, text: str) -> int:
    console.print(text, markup=False)
    return code


async def _run(config: RolloutConfig, folder: JobFolder, console: Console) -> int:
    # As asyncio does for SIGINT.
    asyncio.get_running_loop().add_signal_handler(
        signal.SIGTERM, os.kill, os.getpid(), signal.SIGINT
    )
    output = Output(folder.path, folder.table, config.n, config.shard_bytes)
    missing = 0
    if output.done.all():
        dropped = f", or dropped ({output.dropped:,})" if output.dropped else ""
        console.print(f"all {output.done.size:,} samples are there already{dropped}")
    else:
        try:
            missing = await _generate(config, folder, output, console)
        except DiskFull:
            raise
        except BaseException:  # interrupted, or no endpoint: shards are wanted all the same
            output.finish()
            raise
    output.finish()
    return WITH_FAILURES if missing or output.failed else 0


async def _generate(
    config: RolloutConfig, folder: JobFolder, output: Output, console: Console
) -> int:
    """Returns how many samples could not be had."""
    async with _endpoint(config, folder, console) as urls:
        client = PassingClient(urls, config.timeout_s, config.retry_s, config.access)
        try:
            model = await client.model()
            folder.made_by(model)
            limit = config.concurrency
            if not isinstance(limit, int):
                limit = await client.concurrency()
            async with _recording(config, client, model) as recording:
                job = Job(config, folder.table, output, client, limit, recording)
                try:
                    with Bar(console) as bar:
                        await until_done(job, SHOW_S, bar.show)
                finally:
                    _report(job.summary(), folder, console)
        finally:
            await client.close()
    if job.progress.missing:
        console.print(f"missing samples and why: {errors_path(folder.path)}", markup=False)
    return job.progress.missing


@contextlib.asynccontextmanager
async def _recording(
    config: RolloutConfig, client: PassingClient, model: str
) -> AsyncIterator[RecordingServer | None]:
    if not config.harness:
        yield None
        return
    try:
        server = await RecordingServer(client, config.record_host, model).__aenter__()
    except OSError as error:
        raise BadConfig(f"--record-host {config.record_host}: {error.strerror}") from error
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(server)
        yield server


@contextlib.asynccontextmanager
async def _endpoint(
    config: RolloutConfig, folder: JobFolder, console: Console
) -> AsyncIterator[tuple[str, ...]]:
    if config.endpoint:
        yield config.endpoint
        return
    log = folder.job / "cluster.log"
    console.print(f"starting a cluster; its output is in {log}", markup=False)
    async with own_cluster(config, log) as url:
        yield (url,)


def _report(summary: Summary, folder: JobFolder, console: Console) -> None:
    console.print(summary_table(summary, str(folder.path)))
    with contextlib.suppress(OSError):  # the disk may be full: the table was shown
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        (folder.job / "summary.json").write_bytes(text + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
