"""A real S3 server for tests and benchmarks: Ceph's RADOS gateway over a memory-backed
cluster of one.

Needs Debian's ``radosgw ceph-mon ceph-osd ceph-common``. All daemons listen on free
ports, keep everything below one folder, and are ended by their process ids.
"""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 60.0
_PORTS = range(10240, 16384)

_GATEWAY = ("radosgw", "-n", "client.rgw.a", "-f")

_CONFIG = """[global]
fsid={fsid}
mon host=[v1:127.0.0.1:{mon_port}]
auth cluster required=none
auth service required=none
auth client required=none
auth supported=none
public addr=127.0.0.1
cluster addr=127.0.0.1
osd pool default size=1
osd pool default min size=1
mon allow pool size one=true
paxos propose interval=0.05
osd pool default pg num=1
osd crush chooseleaf type=0
osd objectstore=memstore
memstore device bytes={memory_bytes}
run dir={root}/run
pid file=
log file={root}/log/$name.log
admin socket={root}/run/$name.asok
mon data={root}/mon
osd data={root}/osd
osd max object name len=256
ms bind msgr2=false
mon max pg per osd=1000
osd pool default pg autoscale mode=off
rgw frontends=beast endpoint={address}:{rgw_port} tcp_nodelay=1
rgw dns name=
"""


class RadosGateway:
    """``start()``, then ``options`` are fsspec's for s3 URLs in ``bucket``; ``stop()``.

    ``address`` is where clients reach it; ``within`` goes before every command, such as
    ``ip netns exec NAME``. Objects take at most ``memory_bytes``.
    """

    bucket = "blocks"

    def __init__(
        self,
        root: Path,
        address: str = "127.0.0.1",
        within: Sequence[str] = (),
        memory_bytes: int = 1 << 30,
    ) -> None:
        self._root = root
        self._address = address
        self._within = within
        self._memory_bytes = memory_bytes
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mon_port, self._rgw_port = _free_port(), _free_port()
        self.options: dict[str, Any] = {
            "key": "test-key",
            "secret": "test-secret",
            "endpoint_url": f"http://{address}:{self._rgw_port}",
        }

    def start(self) -> None:
        """Returns once the bucket exists; raises what went wrong otherwise."""
        end = time.monotonic() + START_TIMEOUT_S
        self._start_cluster(end)
        self._start_gateway(end)
        import s3fs  # slow to import, and most tests do without

        s3fs.S3FileSystem(skip_instance_cache=True, **self.options).mkdir(self.bucket)

    @property
    def port(self) -> int:
        """Of the S3 protocol."""
        return self._rgw_port

    def signal_gateway(self, number: signal.Signals) -> None:
        """To what speaks S3; the objects are kept by another process."""
        self._processes[-1].send_signal(number)

    def start_gateway(self) -> None:
        """Once more, after it was killed; returns when it answers."""
        self._processes.pop().wait(10)
        self._spawn_gateway(time.monotonic() + START_TIMEOUT_S)

    def stop(self) -> None:
        """End the daemons that were started, whether or not ``start`` succeeded."""
        for process in reversed(self._processes):
            process.kill()
            process.wait(10)
        self._processes.clear()

    def _start_cluster(self, end: float) -> None:
        fsid = str(uuid.uuid4())
        for folder in ("mon", "osd", "run", "log"):
            (self._root / folder).mkdir()
        (self._root / "ceph.conf").write_text(
            _CONFIG.format(
                fsid=fsid,
                root=self._root,
                mon_port=self._mon_port,
                rgw_port=self._rgw_port,
                address=self._address,
                memory_bytes=self._memory_bytes,
            )
        )
        monmap = str(self._root / "monmap")
        address = f"[v1:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--fsid", fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap)
        self._spawn("ceph-mon", "-i", "a", "-f")
        osd = str(uuid.uuid4())
        self._ask(end, "osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._start_osd(end)

    def _start_osd(self, end: float) -> None:
        """An OSD whose monitor has refused a command, see :meth:`_until_known`, exits: then start
        another."""
        osd = self._spawn("ceph-osd", "-i", "0", "-f")
        while b'"num_up_osds":1' not in self._ask(end, "osd", "stat", "--format=json"):
            if time.monotonic() > end:
                raise RuntimeError(f"ceph-osd did not start: see {self._root}/log")
            if osd.poll() is not None:
                osd = self._spawn("ceph-osd", "-i", "0", "-f")

    def _start_gateway(self, end: float) -> None:
        user = ("user", "create", "--uid=test", "--display-name=test")
        keys = (f"--access-key={self.options['key']}", f"--secret={self.options['secret']}")
        self._until_known(end, "radosgw-admin", *user, *keys)
        self._spawn_gateway(end)

    def _spawn_gateway(self, end: float) -> None:
        """One that was refused, or whose port is not free yet, exits: then start another."""
        gateway = self._spawn(*_GATEWAY)
        while not self._answers():
            if time.monotonic() > end:
                raise RuntimeError(f"radosgw did not start: see {self._root}/log")
            time.sleep(0.2)
            if gateway.poll() is not None:
                self._processes.remove(gateway)
                gateway = self._spawn(*_GATEWAY)

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.options["endpoint_url"], timeout=5).close()
        except urllib.error.HTTPError:
            return True  # what it says does not matter
        except OSError:
            return False
        return True

    def _ask(self, end: float, *arguments: str) -> bytes:
        """A command to the monitor, which may be given twice."""
        return self._until_known(end, "ceph", *arguments)

    def _until_known(self, end: float, program: str, *arguments: str) -> bytes:
        """Run it until the monitor takes it.

        Every client of Ceph begins with a cluster's id of zeros, and takes the right one from the
        monitor's map; a command that overtakes the map, as on a busy machine one in thirty does, is
        refused with EPERM ("wrong fsid"), and nothing has been done.
        """
        while True:
            try:
                return self._run(program, *arguments)
            except RuntimeError as refused:
                said = str(refused)
                known = "EPERM" not in said and "not permitted" not in said
                if known or time.monotonic() > end:
                    raise

    def _command(self, program: str, *arguments: str) -> list[str]:
        config = () if program == "monmaptool" else ("-c", str(self._root / "ceph.conf"))
        return [*self._within, program, *config, *arguments]

    def _run(self, program: str, *arguments: str) -> bytes:
        command = self._command(program, *arguments)
        done = subprocess.run(command, capture_output=True, timeout=START_TIMEOUT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.decode()[-2000:]}")
        return done.stdout

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self._root / "log" / f"{program}.out", "wb") as output:
            process = subprocess.Popen(
                self._command(program, *arguments), stdout=output, stderr=output
            )
        self._processes.append(process)
        return process


def _free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections: one of those could be
    taken again before the daemon binds it."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no free port in {_PORTS}")
