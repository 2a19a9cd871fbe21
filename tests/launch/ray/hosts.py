"""Hosts with Ray on them: namespaces of network, processes, mounts and names on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.testbed.network import Network, Rates, within
from common.user_files import write_private
from tests.control import SECRET

FIRST_RAY_PORT = 6379
TIMEOUT_S = 90
_INIT = """
hostname "$1" && mount -t tmpfs tmpfs /dev/shm && mount --bind "$2" /tmp/ray || exit 1
echo up; trap '' CHLD; exec sleep infinity
"""
"""Its children are reaped: a raylet that is a zombie counts as alive for Ray's workers."""


class RayHosts:
    """``roles`` of hosts by name, as labels; the first one has Ray's head."""

    def __init__(self, roles: dict[str, str], folder: Path) -> None:
        self.roles, self.folder = roles, folder
        self.network = Network(list(roles), Rates(storage_mbit=10_000, compute_mbit=10_000))
        self.head = next(iter(roles))
        self.ray_port = FIRST_RAY_PORT
        self.env = {
            **os.environ,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "ray.token"),
            # Few threads: the hosts share one machine.
            "RAY_grpc_server_num_threads": "1",
            "RAY_gcs_server_rpc_server_thread_num": "1",
        }
        self._inits: dict[str, subprocess.Popen[str]] = {}
        self._first: dict[str, int] = {}
        write_private(folder / "cluster.secret", SECRET.encode())
        write_private(folder / "ray.token", b"t" * 64)

    # ---- life ---------------------------------------------------------------------------

    def build(self) -> None:
        self.network.build()
        Path("/tmp/ray").mkdir(exist_ok=True)
        for name in self.roles:
            (self.folder / name).mkdir()
            own = ("unshare", "--fork", "--pid", "--mount-proc", "--mount", "--uts", "--ipc")
            shell = ("bash", "-c", _INIT, "bash", f"{name}-{os.getpid()}", str(self.folder / name))
            where = within(self.network.namespace(name))
            init = subprocess.Popen([*where, *own, *shell], stdout=subprocess.PIPE, text=True)
            assert init.stdout is not None and init.stdout.readline() == "up\n"
            children = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text()
            self._inits[name], self._first[name] = init, int(children)

    def remove(self) -> None:
        for name, init in self._inits.items():
            os.kill(self._first[name], signal.SIGKILL)  # and with it all of its namespace
            init.wait(TIMEOUT_S)
        self.network.remove()

    # ---- what runs there ----------------------------------------------------------------

    def address(self, name: str) -> str:
        return self.network.compute_address(name)

    @property
    def ray_address(self) -> str:
        return f"{self.address(self.head)}:{self.ray_port}"

    def command(self, name: str, *argv: str) -> list[str]:
        enter = ["nsenter", f"--target={self._first[name]}", "--net", "--mount", "--uts", "--ipc"]
        return [*enter, "--pid", f"--wd={os.getcwd()}", *argv]

    def start_ray(self, name: str, **environment: str) -> None:
        flags = [f"--node-ip-address={self.address(name)}", "--num-cpus=3"]
        flags += ["--object-store-memory=80000000", "--disable-usage-stats"]
        flags += [f"--labels=dualpath-role={self.roles[name]}"]
        if name == self.head:
            flags += ["--head", f"--port={self.ray_port}", "--include-dashboard=false"]
        else:
            flags += [f"--address={self.ray_address}"]
        argv = self.command(name, sys.executable, "-m", "ray.scripts.scripts", "start", *flags)
        env = {**self.env, **environment}
        with (self.folder / f"{name}-ray.log").open("ab") as log:
            subprocess.run(argv, env=env, stdout=log, stderr=log, check=True, timeout=TIMEOUT_S)

    def driver(self, *flags: str) -> subprocess.Popen[bytes]:
        """``launch.cluster --ray`` on the head's host; what it says is in driver.log."""
        argv = [sys.executable, "-m", "launch.cluster", "--ray", *flags]
        argv += [f"--ray-address={self.ray_address}"]
        argv += [f"--cluster-secret-file={self.folder / 'cluster.secret'}"]
        with (self.folder / "driver.log").open("ab") as log:
            return subprocess.Popen(
                self.command(self.head, *argv), env=self.env, stdout=log, stderr=log
            )

    def scale_command(self, *flags: str) -> list[str]:
        flags = (f"--ray-address={self.ray_address}", "--timeout-s=240", *flags)
        return self.command(self.head, sys.executable, "-m", "launch.scale", *flags)

    def scale(self, *flags: str) -> str:
        argv = self.scale_command(*flags)
        done = subprocess.run(argv, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr + self.said()[-6000:]
        return done.stdout

    def pids(self, name: str, words: str) -> list[int]:
        """Processes of a host in whose command line these words are."""
        namespace = self.network.namespace(name)
        listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
        found = []
        for pid in map(int, listed.stdout.split()):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it has ended
                continue
            if words in line and not line.startswith("nsenter"):
                found.append(pid)
        return found

    def kill(self, name: str, words: str) -> None:
        pids = self.pids(name, words)
        assert pids, f"no process of {name} is {words}"
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def left(self) -> list[str]:
        """What there is of a cluster's: processes, and shared memory."""
        found = []
        for name in self.roles:
            for words in ("-m launch.", "engine.serve", "sglang", "transfer.agent"):
                lines = [Path(f"/proc/{pid}/cmdline") for pid in self.pids(name, words)]
                found += [f"{name}: {line.read_text()}" for line in lines if line.exists()]
            listing = self.command(name, "ls", "/dev/shm")
            shared = subprocess.run(listing, capture_output=True, text=True).stdout.split()
            found += [f"{name}: {file}" for file in shared if "plasma" not in file]
        return found

    def said(self) -> str:
        return (self.folder / "driver.log").read_text(errors="replace")


def until(holds: Callable[[], bool], what: Callable[[], str], timeout_s: float = TIMEOUT_S) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_at, what()
        time.sleep(0.1)
