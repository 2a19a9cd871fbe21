"""Runs what "By hand" of ``docs/deploy.md`` says, as written, with namespaces as hosts:

    python -m tests.launch.node.run_deploy_page

as root, from a checkout that is set up. Not a test: it takes minutes, and there are tests of such
clusters. Ends with 1 at the first thing that is not as the page says.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.testbed.network import own_shared_memory, within
from common.user_files import cache_folder

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "deploy.md").read_text()


def blocks(section: str) -> list[list[str]]:
    """Lines of each block of code in a section of the page."""
    found = re.search(rf"^## {section}$(.*?)^## ", PAGE, re.M | re.S)
    assert found
    code = re.findall(r"^```\w*\n(.*?)^```$", found[1], re.M | re.S)
    return [block.splitlines() for block in code]


SECRET, GATEWAY, NODES, ON_ONE_MACHINE = blocks("By hand")[:4]
HEALTH = re.findall(r"`(curl \S+/health)`", PAGE)[0]
START_TIMEOUT_S, END_TIMEOUT_S, COMMAND_TIMEOUT_S = 300, 150, 120
FIRST = "Tell me, in a few sentences, what a harbour pilot does."
SECOND = "Why is that needed?"


class Failed(Exception):
    """Something is not as the page says."""


def run(*argv: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise Failed(f"{argv}: {done.stderr}")
    return done.stdout


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[str]]:
    """Namespaces 10.0.0.1 and so on, on one switch."""
    switch, *names = [f"page{os.getpid()}-{number}" for number in range(count + 1)]
    try:
        for name in (switch, *names):
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "dev", "lo", "up")
        run("ip", "-n", switch, "link", "add", "name", "switch", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "dev", "switch", "up")
        for number, name in enumerate(names, 1):
            port = f"port{number}"
            peer = ("type", "veth", "peer", "name", port, "netns", switch)
            run("ip", "-n", name, "link", "add", "name", "eth0", *peer)
            run("ip", "-n", switch, "link", "set", "dev", port, "master", "switch", "up")
            run("ip", "-n", name, "address", "add", f"10.0.0.{number}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "dev", "eth0", "up")
        yield names
    finally:
        for name in (switch, *names):
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], check=False)


def home_of(host: str, folder: Path) -> Path:
    """In which the model is, as `make setup` of that host has built it."""
    home = folder / f"home-{host}"
    models = home / ".cache" / "dualpath" / "models"
    if not models.exists():
        models.parent.mkdir(parents=True)
        models.symlink_to(cache_folder() / "models")
    return home


def is_healthy(host: str, command: str) -> bool:
    """``command`` is a curl of the page's."""
    curl = [*within(host), *command.split(), "-s", "-o", "/dev/null", "-w", "%{http_code}"]
    done = subprocess.run(curl, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    return done.stdout == "200"


class Started:
    """Commands that were started, each on its host, with a home of its own there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, host: str, command: str) -> None:
        print(f"  {host.partition('-')[2]}$ {command}", flush=True)
        home = home_of(host, self.folder)
        argv = [*within(host), *own_shared_memory(), "sh", "-c", f"exec {command}"]
        env = {**os.environ, "HOME": str(home)}
        env.pop("XDG_CACHE_HOME", None)
        with (self.folder / f"{len(self.processes)}.log").open("wb") as output:
            self.processes.append(
                subprocess.Popen(argv, cwd=ROOT, env=env, stdout=output, stderr=output)
            )

    def wait_healthy(self, host: str, command: str) -> None:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while True:
            if is_healthy(host, command):
                return
            ended = [process.args for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > give_up_at:
                raise Failed(f"no health, ended: {ended}\n{self.logs()}")
            time.sleep(0.5)

    def leave(self) -> None:
        """Nodes first; each in good order."""
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            code = process.wait(END_TIMEOUT_S)
            if code and process is not self.processes[0]:
                raise Failed(f"{process.args!r} ended with {code}\n{self.logs()}")

    def logs(self) -> str:
        return "\n".join(p.read_text()[-2000:] for p in sorted(self.folder.glob("*.log")))


def chat(host: str, url: str, messages: Sequence[dict[str, str]]) -> tuple[str, int]:
    """What it says, and how many tokens of the prompt were not computed."""
    body = {"model": "default", "max_tokens": 64, "temperature": 0, "messages": messages}
    answer = json.loads(
        run(
            *within(host),
            *("curl", "-s", f"{url}/chat/completions", "-H", "Content-Type: application/json"),
            *("-d", json.dumps(body)),
        )
    )
    details = answer["usage"]["prompt_tokens_details"] or {}
    return answer["choices"][0]["message"]["content"], details.get("cached_tokens", 0)


def second_turn_hits(host: str, url: str) -> None:
    question = {"role": "user", "content": FIRST}
    said, _ = chat(host, url, [question])
    turn = [question, {"role": "assistant", "content": said}, {"role": "user", "content": SECOND}]
    _, cached = chat(host, url, turn)
    print(f"  said: {said[:60]!r}...; of the second turn's prompt {cached} tokens were there")
    if not cached:
        raise Failed("the second turn has hit nothing")


def serve(names: list[str], commands: list[str], health: str, url: str) -> None:
    """Each command on the host at its place."""
    with tempfile.TemporaryDirectory() as folder:
        started = Started(Path(folder))
        began = time.monotonic()
        for name, command in zip(names, commands, strict=True):
            started.start(name, command)
        started.wait_healthy(names[0], health)
        print(f"  health is 200 after {time.monotonic() - began:.0f} s")
        second_turn_hits(names[0], url)
        started.leave()
        if left := [pid for name in names for pid in run("ip", "netns", "pids", name).split()]:
            raise Failed(f"left over: {left}")


def main() -> int:
    secret = ROOT / "cluster.secret"
    try:
        with hosts(4) as names:
            for line in SECRET:
                run("sh", "-c", f"cd {ROOT} && {line}")
            print("four hosts:")
            serve(names, [*GATEWAY, *NODES], HEALTH, "http://10.0.0.1:30000/v1")
            print("one machine:")
            local = HEALTH.replace("10.0.0.1", "127.0.0.1")
            one = [names[0]] * len(ON_ONE_MACHINE)
            serve(one, ON_ONE_MACHINE, local, "http://127.0.0.1:30000/v1")
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    finally:
        secret.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
