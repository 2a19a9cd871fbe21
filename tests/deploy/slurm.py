"""A Slurm of four hosts on this machine: daemons of its own, without systemd or files in /etc."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
HOSTS = ("h1", "h2", "h3", "h4")
PORTS = 1 + len(HOSTS)
START_TIMEOUT_S, STOP_TIMEOUT_S, COMMAND_TIMEOUT_S = 30, 10, 30


def missing() -> list[str]:
    """Programs that a Slurm needs and this machine lacks."""
    return [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]


class Slurm:
    """Its commands, as a user of it calls them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.submitted: list[subprocess.Popen[bytes]] = []

    def ask(self, *argv: str) -> str:
        done = subprocess.run(
            argv, env=self.env, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
        assert done.returncode == 0, (argv, done.stderr)
        return done.stdout

    def submit(
        self, where: Path, argv: list[str], env: dict[str, str]
    ) -> tuple[str, subprocess.Popen[bytes]]:
        """The id of a job, and a process that ends as the job does."""
        output = where / f"sbatch-{secrets.token_hex(4)}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["sbatch", "--parsable", "--wait", *argv],
                cwd=where,
                env={**self.env, **env},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.submitted.append(process)
        give_up_at = time.monotonic() + COMMAND_TIMEOUT_S
        while not (said := output.read_text()).endswith("\n"):
            assert process.poll() is None and time.monotonic() < give_up_at, said
            time.sleep(0.05)
        return said.split()[0], process

    def log(self) -> str:
        return "\n".join(
            f"==== {p.name}\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.log")
        )


@contextlib.contextmanager
def running_slurm(folder: Path, first_port: int) -> Iterator[Slurm]:
    """Ends what its jobs have left, too."""
    folder.mkdir()
    folder.chmod(0o755)
    (folder / "munge").mkdir(mode=0o700)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "munge" / "key").chmod(0o400)
    (folder / "slurm.conf").write_text(_configuration(folder, first_port))
    slurm = Slurm(folder)
    with contextlib.ExitStack() as stack:
        stack.callback(_kill_rest, slurm)

        def run(*argv: str) -> None:
            with (folder / f"{argv[0]}.out.log").open("ab") as output:
                process = subprocess.Popen(argv, env=slurm.env, stdout=output, stderr=output)
            stack.callback(_end, process)

        munge = [
            f"--{name}-file={folder / 'munge' / name}" for name in ("key", "seed", "pid", "log")
        ]
        run("munged", "--foreground", "--force", f"--socket={folder / 'munge.socket'}", *munge)
        _wait(slurm, (folder / "munge.socket").exists, "munged")
        run("slurmctld", "-D", "-f", slurm.env["SLURM_CONF"])
        for host in HOSTS:
            run("slurmd", "-D", "-N", host, "-f", slurm.env["SLURM_CONF"])
        _wait(slurm, lambda: _idle_hosts(slurm) == len(HOSTS), "all hosts are idle")
        stack.callback(_cancel_jobs, slurm)
        yield slurm


def _configuration(folder: Path, first_port: int) -> str:
    name = socket.gethostname().partition(".")[0]
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={name}(127.0.0.1)",
        f"SlurmctldPort={first_port}",
        f"SlurmUser={getpass.getuser()}",
        f"SlurmdUser={getpass.getuser()}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={folder}/munge.socket",
        "CredType=cred/munge",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd-%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd-%n.log",
        # As the usual one with cgroups, which needs systemd: only tasks themselves get signals.
        "ProctrackType=proctrack/pgid",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "KillWait=60",
        "SlurmdParameters=config_overrides",
    ]
    for number, host in enumerate(HOSTS, 1):
        own = f"NodeName={host} NodeHostname={name} NodeAddr=127.0.0.1 Port={first_port + number}"
        lines.append(f"{own} CPUs=2 RealMemory=2000")
    lines.append("PartitionName=main Nodes=ALL Default=YES State=UP")
    return "\n".join(lines) + "\n"


def _idle_hosts(slurm: Slurm) -> int:
    return slurm.ask("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")


def _wait(slurm: Slurm, holds: Callable[[], bool], what: str) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(AssertionError):  # the controller does not answer yet
            if holds():
                return
        if time.monotonic() > give_up_at:
            raise TimeoutError(f"Slurm: {what} not in time\n{slurm.log()}")
        time.sleep(0.1)


def _cancel_jobs(slurm: Slurm) -> None:
    """Of a test that failed."""
    for job in slurm.ask("squeue", "--noheader", "--format=%i").split():
        slurm.ask("scancel", job)


def _kill_rest(slurm: Slurm) -> None:
    """All that has this Slurm's environment: of jobs that did not end with it."""
    mark = b"SLURM_CONF=" + slurm.env["SLURM_CONF"].encode() + b"\0"
    for pid in psutil.pids():
        with contextlib.suppress(OSError):  # it has ended, or is somebody else's
            if mark in Path(f"/proc/{pid}/environ").read_bytes():
                os.kill(pid, signal.SIGKILL)
    for submitted in slurm.submitted:
        _end(submitted)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)
