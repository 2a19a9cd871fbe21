"""The process that runs on one host, as a child of the worker that Ray started there.

It ends with the worker, however that ends: the kernel sends it SIGTERM, at which it drains. Nothing
of it is in a file that could be left: its secret and what it says are in files without a name.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO
from urllib.parse import urlsplit

from common.user_files import cache_folder, private
from launch.ray.commands import SECRET_FILE, HostCommand

_PR_SET_PDEATHSIG = 1
_READ_BYTES_MAX = 64 << 10
_KEPT_BYTES_MAX = 4 << 20
_TRIM_S = 10.0
"""What it says is emptied at that size when nobody reads it: no driver may live."""
_libc = ctypes.CDLL(None)


class HostProcess:
    """One start of a command. Methods return at once, and are to be called on one thread that lives
    as long as the process should: the kernel's signal is for the death of the thread."""

    def __init__(self, command: HostCommand, secret: str, environment: Mapping[str, str]) -> None:
        """``environment`` is all that it has."""
        self.command = command
        self._secret = secret
        self._environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] = tempfile.TemporaryFile(mode="a+b", buffering=0)
        self._read_bytes = 0
        self._is_over = False
        threading.Thread(target=self._keep_small, daemon=True).start()
        self.poll()

    def poll(self) -> int | None:
        """Its exit code, once it has ended; starts it if what had its name before has ended by
        now."""
        if self._process is None and not self._is_over:
            with _name_of_its_own(self.command) as lock:
                if lock is not None:
                    self._start(lock)
        if self._process is None:
            return 0 if self._is_over else None
        return self._process.poll()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def waits(self) -> bool:
        """For the end of another of its name on this host, which drains."""
        return self._process is None and not self._is_over

    def said(self) -> str:
        """What it has written since the last call, or the first part of it."""
        self._output.seek(self._read_bytes)
        new = self._output.read(_READ_BYTES_MAX)
        self._read_bytes += len(new)
        return new.decode(errors="replace")

    def end(self, at_once: bool = False) -> None:
        """Have it drain and end, or end at once. Without a process: never start one."""
        self._is_over = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)

    def _start(self, lock: int) -> None:
        worker = os.getpid()

        def prepare() -> None:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != worker:  # it died before the call above
                os._exit(1)

        secret = _unnamed_file(self._secret.encode())
        try:
            flags = [flag.replace(SECRET_FILE, f"/dev/fd/{secret}") for flag in self.command.flags]
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", self.command.module, *flags],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(secret, lock),
                preexec_fn=prepare,
            )
        finally:
            os.close(secret)

    def _keep_small(self) -> None:
        while True:
            time.sleep(_TRIM_S)
            if os.fstat(self._output.fileno()).st_size > _KEPT_BYTES_MAX:
                self._output.truncate(0)
                self._read_bytes = 0


def _unnamed_file(content: bytes) -> int:
    """A descriptor that a child can open by its number, and nobody else at all."""
    descriptor = os.memfd_create("secret", os.MFD_CLOEXEC)
    os.fchmod(descriptor, 0o600)
    os.write(descriptor, content)
    return descriptor


@contextlib.contextmanager
def _name_of_its_own(command: HostCommand) -> Iterator[int | None]:
    """A lock that the process holds while it lives, also when its worker has died; None while
    another has it."""
    folder = cache_folder() / "ray"  # hosts may share a home
    folder.mkdir(parents=True, exist_ok=True)
    cluster = "-".join(urlsplit(url).netloc for url in command.urls).replace(":", "-")
    name = f"{os.uname().nodename}-{cluster}-{command.name}-{command.rank}"
    with open(folder / name, "ab", opener=private) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()
