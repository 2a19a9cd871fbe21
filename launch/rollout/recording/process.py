"""One harness process: an agent that owns its loop, run for one episode, with bounds on its time
and on what is kept of its output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from common.json import JsonObject
from launch.rollout.own_cluster import ending_with_us

STOP_S = 5.0
"""From SIGTERM to SIGKILL."""
PIPES_S = 2.0
"""For output to end once all processes have: one that left its group may hold it open."""
RESULT_BYTES_MAX = 1 << 20
_READ_BYTES = 1 << 16
_KEPT_NAMES = ("DUALPATH_", "OPENAI_", "ANTHROPIC_")
"""Variables of the job, which are none of its agents': keys, and whom else they would ask."""


class BadResult(Exception):
    """A harness has left a result that is none; the text says why."""


class Ended(msgspec.Struct):
    """How a harness ended."""

    exit_code: int
    """Negative: the signal."""
    is_late: bool
    """Its time was over."""
    reward: float | None
    output: str
    """The end of what it wrote to stderr, or to stdout if that was nothing."""


class Limits(msgspec.Struct, frozen=True):
    """Of one process, in seconds, and in bytes of each of its two outputs."""

    timeout_s: float
    output_bytes: int


async def run_harness(command: str, url: str, row: JsonObject, limits: Limits) -> Ended:
    """Run ``command`` (without a shell) until it ends; when cancelled, all of its group is ended.
    Raises ``OSError`` if there is no such program, and :class:`BadResult`."""
    with tempfile.TemporaryDirectory(prefix="dualpath-harness-") as name:
        folder = Path(name)
        row_path, result = folder / "row.json", folder / "result.json"
        row_path.write_bytes(msgspec.json.encode(row, enc_hook=str))
        given = {"ROLLOUT_ROW": str(row_path), "ROLLOUT_RESULT": str(result)}
        variables = environment(url, os.environ) | given
        with _Pipes() as pipes:
            process = subprocess.Popen(
                shlex.split(command),
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=pipes.out.write_end,
                stderr=pipes.err.write_end,
                start_new_session=True,  # a group of its own, which is ended as one
                preexec_fn=ending_with_us(),
            )
            pipes.begin(limits.output_bytes)
            try:
                is_late = not await _ends(process, limits.timeout_s)
            finally:
                await _end_group(process)
            await pipes.drain()
        reward = _reward(result, pipes.out.kept)
        said = (pipes.err.kept or pipes.out.kept).decode(errors="replace")
        return Ended(process.returncode, is_late, reward, said)


def environment(url: str, ours: Mapping[str, str]) -> dict[str, str]:
    """Of a harness whose episode is at ``url``: what OpenAI's and Anthropic's clients read."""
    kept = {name: value for name, value in ours.items() if not name.startswith(_KEPT_NAMES)}
    base, _, key = url.rpartition("/")
    host = base.split("//")[1].rpartition(":")[0].strip("[]")
    direct = ",".join(filter(None, (ours.get("no_proxy") or ours.get("NO_PROXY"), host)))
    return kept | {
        "ROLLOUT_BASE_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "OPENAI_API_BASE": f"{url}/v1",
        "OPENAI_API_KEY": key,
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": key,
        "NO_PROXY": direct,
        "no_proxy": direct,
    }


# ---- its end ------------------------------------------------------------------------------


async def _ends(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Whether it has by then. It is not reaped: until then its group's number is nobody else's."""
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    watched = os.pidfd_open(process.pid)
    loop.add_reader(watched, ended.set)
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
        return True
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(watched)
        os.close(watched)


async def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to all of it, and SIGKILL to what is left of it then."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        await _ends(process, STOP_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- what it says -------------------------------------------------------------------------


class _Output:
    """The end of what comes through one pipe."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.kept = b""

    async def read(self, most_bytes: int) -> None:
        """Until everyone has closed it; the oldest beyond ``most_bytes`` go."""
        loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
        pipe = os.fdopen(self.read_end, "rb", 0)
        transport, _ = await loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        try:
            while chunk := await reader.read(_READ_BYTES):
                self.kept = (self.kept + chunk)[-most_bytes:]
        finally:
            transport.close()


class _Pipes:
    """Of one process."""

    def __init__(self) -> None:
        self.out, self.err = _Output(), _Output()
        self._reading: set[asyncio.Task[None]] = set()

    def __enter__(self) -> _Pipes:
        return self

    def begin(self, most_bytes: int) -> None:
        """The process has its ends."""
        for output in (self.out, self.err):
            os.close(output.write_end)
            output.write_end = -1
            self._reading.add(asyncio.create_task(output.read(most_bytes)))

    async def drain(self) -> None:
        await asyncio.wait(self._reading, timeout=PIPES_S)

    def __exit__(self, *_: object) -> None:
        for task in self._reading:
            task.cancel()
        if not self._reading:  # it could not be started
            for output in (self.out, self.err):
                os.close(output.read_end)
                os.close(output.write_end)


def _reward(result: Path, stdout: bytes) -> float | None:
    """Of the file that it may leave, or else of its last line; None without either."""
    if result.exists():
        if result.stat().st_size > RESULT_BYTES_MAX:
            raise BadResult(f"ROLLOUT_RESULT has more than {RESULT_BYTES_MAX} bytes")
        try:
            return msgspec.json.decode(result.read_bytes(), type=_Result).reward
        except msgspec.DecodeError as error:
            raise BadResult(f"what it wrote to ROLLOUT_RESULT is no result: {error}") from error
    *_, last = stdout.rstrip().split(b"\n")
    try:
        return msgspec.json.decode(last, type=_Result).reward
    except msgspec.DecodeError:  # whatever else it says
        return None


class _Result(msgspec.Struct):
    reward: float | None = None
