"""A job whose endpoint is a function, in a process of its own: prints its peak memory.

HTTP would take most of the time and is tested elsewhere.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

from launch.rollout.answers import Generation, Span
from launch.rollout.client import Client
from launch.rollout.config import load_config
from launch.rollout.job import Job
from launch.rollout.output.job_folder import JobFolder
from launch.rollout.output.shards import Output


class FunctionClient(Client):
    """Answers at once."""

    async def generate(
        self, token_ids: list[int], sampling: dict[str, Any], logprobs: bool, name: str
    ) -> Generation:
        await asyncio.sleep(0)
        ids = [token_ids[0] + i for i in range(8)]
        return Generation("text of it", ids, [-0.5] * 8, "length", None, 0, [Span("v1", 0, 8)], 0)


async def run(source: str, output: str) -> None:
    flags = ["--input", source, "--output", output, "--endpoint", "http://127.0.0.1:9"]
    config = load_config([*flags, "--logprobs", "--order", "shuffled", "--shard-bytes", "8MiB"])
    folder = JobFolder(config)
    samples = Output(folder.path, folder.table, config.n, config.shard_bytes)
    client = FunctionClient(config.endpoint, 1.0, 1.0)
    job = Job(config, folder.table, samples, client, 32)
    await job.run()
    samples.finish()
    await client.close()


def peak_bytes() -> int:
    """Of memory that is not a mapped file: the rows are mapped, and may be paged out."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, now, mapped = (int(status[k].split()[0]) for k in ("VmHWM", "VmRSS", "RssFile"))
    return (peak - min(mapped, now)) << 10


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], sys.argv[2]))
    print(peak_bytes())
