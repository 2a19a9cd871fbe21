"""Runs what "Ray" of ``docs/deploy.md`` says, as written, with namespaces as hosts:

    python -m tests.launch.ray.run_deploy_page

as root, from a checkout that is set up with ``make setup RAY=1``. Not a test: it takes minutes, and
there is a test of such a cluster. Ends with 1 at the first thing that is not as the page says.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.testbed.network import within
from tests.launch.node.run_deploy_page import (
    HEALTH,
    ROOT,
    START_TIMEOUT_S,
    Failed,
    blocks,
    home_of,
    hosts,
    is_healthy,
    run,
    second_turn_hits,
)

[SECRET, EXPORT, HEAD, OTHER, HOSTS, DRIVER, SCALE] = blocks("Ray")[:7]
COMMAND_TIMEOUT_S = 900
TYPED = "typed, and ended with"


class Shell:
    """Of an operator on one host, which has processes, names and folders of its own."""

    def __init__(self, host: str, folder: Path) -> None:
        self.host = host
        self.log = folder / f"{host}.log"
        own = ("unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc")
        env = {**os.environ, "HOME": str(home_of(host, folder))}
        env.pop("XDG_CACHE_HOME", None)
        self._bash = subprocess.Popen(
            [*within(host), *own, "--kill-child", "bash"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        (folder / host).mkdir()
        self.type(f"hostname {host}; mount -t tmpfs tmpfs /dev/shm", is_shown=False)
        self.type(f"mount --bind {folder / host} /tmp/ray", is_shown=False)

    def type(self, line: str, is_shown: bool = True) -> None:
        """Raises :class:`Failed` unless it ends with 0."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        if is_shown:
            print(f"  {self.host.partition('-')[2]}$ {line}", flush=True)
        self._bash.stdin.write(f"{{ {line}\n}} >>{self.log} 2>&1; echo {TYPED} $?\n")
        self._bash.stdin.flush()
        ready, _, _ = select.select([self._bash.stdout], [], [], COMMAND_TIMEOUT_S)
        said = self._bash.stdout.readline() if ready else "it has not ended in time"
        if said != f"{TYPED} 0\n":
            raise Failed(f"{line!r}: {said}\n{self.log.read_text()[-4000:]}")

    def close(self) -> None:
        """What still runs there ends with it."""
        self._bash.kill()
        self._bash.wait(COMMAND_TIMEOUT_S)

    def pids(self) -> list[int]:
        """Of what runs there, apart from itself."""
        found = run("ip", "netns", "pids", self.host).split()
        lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
        own = (b"unshare", b"bash")
        return [pid for pid, line in lines.items() if not line.startswith(own)]


def serve(first: Shell, second: Shell) -> None:
    """The cluster of the page, from its start to its end."""
    for shell in (first, second):
        for line in EXPORT:
            shell.type(line)
    first.type(HEAD[0])
    second.type(OTHER[0])
    began = time.monotonic()
    first.type(f"{DRIVER[0]} & driver=$!")
    while not is_healthy(first.host, HEALTH):
        if time.monotonic() - began > START_TIMEOUT_S:
            raise Failed(f"no health\n{first.log.read_text()[-8000:]}")
        time.sleep(0.5)
    print(f"  health is 200 after {time.monotonic() - began:.0f} s")
    second_turn_hits(first.host, "http://10.0.0.1:30000/v1")
    for line in SCALE:
        second.type(line)
    first.type("kill -TERM $driver; wait $driver")
    for shell in (first, second):
        shell.type(".venv/bin/ray stop")
        if left := shell.pids():
            raise Failed(f"left over on {shell.host}: {left}")


def main() -> int:
    profile = ROOT / "hosts.yaml"
    secrets = [ROOT / name for name in ("cluster.secret", "ray.token")]
    Path("/tmp/ray").mkdir(exist_ok=True)
    shells: list[Shell] = []
    try:
        with hosts(2) as names, tempfile.TemporaryDirectory() as folder:
            run("sh", "-c", f"cd {ROOT} && {SECRET[0]}")
            profile.write_text("\n".join(HOSTS) + "\n")
            shells = [Shell(name, Path(folder)) for name in names]
            try:
                serve(*shells)
            finally:
                for shell in shells:
                    shell.close()
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    finally:
        for file in (profile, *secrets):
            file.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
