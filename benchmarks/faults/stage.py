"""What the cluster stands on, each part of it breakable: hosts, disks, and the way to S3."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import own_clock
from benchmarks.own_cluster import ClusterFailed
from benchmarks.radosgw import RadosGateway
from benchmarks.s3_proxy import Fault, FaultyProxy, Verdict
from benchmarks.testbed.cluster import BLOCK_BYTES, EngineChange, records_on
from benchmarks.testbed.network import STORAGE, Network, Rates, within
from launch.cluster.config import ClusterConfig
from launch.cluster.layout import agent_name
from launch.cluster.process_record import ProcessRecord

CLOCK_AGENT = "agent-d1"
"""Whose clock can be stepped."""
NODES = ("p0", "p1", "d0", "d1")
PORT = 20000
POOL_TOKENS = 32768
LINK_MBIT = 1000.0
DISK_BYTES = 512 << 20
SSD_BYTES = 384 << 20
"""Nothing has to make way, so that what is missing was lost."""
MIN_FREE_BYTES = 16 << 20
DRAM_BYTES = 128 * BLOCK_BYTES
STORE_BYTES = 3 << 30
REMOTE_FOLDER = "kv"
TIMEOUT_S = 6.0
"""Of a storage read, and of a delivery."""
REQUEST_TIMEOUT_S = 45.0
COMMAND_TIMEOUT_S = 20.0
S3_SHARE = 0.5
"""Of the answers that are bad while S3's are."""
S3_SLOW_S = 3.0

S3_FAULTS = {
    "500": Fault.ERROR_500,
    "503": Fault.ERROR_503,
    "reset": Fault.RESET,
    "truncate": Fault.TRUNCATE,
    "stall": Fault.STALL,
}


class Disk:
    """A file system of its own for one agent's SSD tier."""

    def __init__(self, image: Path, mount: Path) -> None:
        self._image = image
        self.mount = mount

    def make(self) -> None:
        self.mount.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(DISK_BYTES)
        run("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount()

    def _mount(self) -> None:
        options = "loop,errors=remount-ro"
        run("mount", "-o", options, str(self._image), str(self.mount))

    def fill(self) -> None:
        """Not a byte is free."""
        with (self.mount / "filler").open("wb", buffering=0) as file:
            for nbytes in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):  # it is full
                    while file.write(bytes(nbytes)):
                        pass
                os.fsync(file.fileno())

    def empty(self) -> None:
        (self.mount / "filler").unlink(missing_ok=True)

    def break_(self) -> None:
        """As after an error of the device: it is read-only from now on."""
        device = Path(run("findmnt", "-n", "-o", "SOURCE", str(self.mount)).strip()).name
        Path(f"/sys/fs/ext4/{device}/trigger_fs_error").write_text("broken by benchmarks.faults")

    def unmount(self) -> None:
        """Raises :class:`ClusterFailed` while it is open somewhere."""
        run("umount", str(self.mount))

    def replace(self) -> None:
        """What was unmounted, repaired and mounted again."""
        done = subprocess.run(
            ["fsck.ext4", "-y", "-f", str(self._image)],
            capture_output=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        if done.returncode >= 4:  # errors that are left
            raise ClusterFailed(f"fsck: {done.stdout.decode()[-500:]}")
        self._mount()

    def remove(self) -> None:
        if self.mount.is_mount():
            run("umount", "--lazy", str(self.mount))

    def slabs(self) -> list[Path]:
        files = self.mount.rglob("*")
        return [path for path in files if path.is_file() and path.stat().st_size > BLOCK_BYTES]


class Stage:
    """``with Stage(...).built()``; the calling thread must be in the network's control space."""

    def __init__(self, scratch: Path, network: Network) -> None:
        self.network = network
        self.scratch = scratch
        self.store_address = network.control_address(STORAGE)
        self.s3 = RadosGateway(_made(scratch / "s3"), self.store_address, (), STORE_BYTES)
        self.disks = {
            agent_name(node): Disk(scratch / f"{node}.img", scratch / "ssd" / agent_name(node))
            for node in NODES
        }
        self.clock = scratch / "clock"
        """How far the clock of one agent is off, for ``own_clock``."""
        self.engine_wait_s = 0.0
        """For which the gateway keeps a request while a role has no engine."""
        self._proxy: FaultyProxy | None = None

    @contextlib.contextmanager
    def built(self) -> Iterator[Stage]:
        try:
            for disk in self.disks.values():
                disk.make()
            own_clock.write_offset(self.clock, 0)
            own_clock.build(self.scratch)
            self.s3.start()
            self._proxy = FaultyProxy(self.store_address, self.s3.port)
            yield self
        finally:
            if self._proxy is not None:
                self._proxy.close()
            self.s3.stop()
            for disk in self.disks.values():
                disk.remove()

    # ---- the cluster on it --------------------------------------------------------------

    def records(self, logs: Path) -> list[ProcessRecord]:
        assert self._proxy is not None
        config = ClusterConfig(
            model="tiny",
            prefill=2,
            decode=2,
            host="127.0.0.1",
            port=PORT,
            device="cpu",
            transfer="tcp",
            dram_bytes=DRAM_BYTES,
            ssd_dir=(self.scratch / "ssd",),
            ssd_bytes=SSD_BYTES,
            ssd_min_free_bytes=MIN_FREE_BYTES,
            remote=f"s3://{self.s3.bucket}/{REMOTE_FOLDER}",
            remote_options=self._options(),
            path_policy="n-way",
            load_policy="always",
            max_total_tokens=POOL_TOKENS,
            read_timeout_s=TIMEOUT_S,
            deliver_timeout_s=TIMEOUT_S,
            request_timeout_s=REQUEST_TIMEOUT_S,
            log_dir=str(logs),
            poison_kv=True,
        )
        self.engine_wait_s = config.engine_wait_s
        as_shipped = {node: EngineChange(experiment=config.experiment) for node in NODES}
        records = records_on(self.network, config, as_shipped, dram_keep=True)
        return [self._with_own_clock(r) if r.name == CLOCK_AGENT else r for r in records]

    def _with_own_clock(self, record: ProcessRecord) -> ProcessRecord:
        clock = own_clock.environment(self.scratch, self.clock)
        return dataclasses.replace(record, env={**record.env, **clock})

    def _options(self) -> dict[str, Any]:
        assert self._proxy is not None
        return {
            **self.s3.options,
            "endpoint_url": f"http://{self.store_address}:{self._proxy.port}",
        }

    # ---- faults -------------------------------------------------------------------------

    def spoil_s3(self, how: str, rng: random.Random) -> None:
        """Answers of S3 from now on; "" heals it."""
        assert self._proxy is not None
        fault = S3_FAULTS.get(how, Fault.NONE)
        delay_s = S3_SLOW_S if how == "slow" else 0.0

        def judge(method: str, path: str) -> Verdict:
            return Verdict(fault, delay_s) if rng.random() < S3_SHARE else Verdict()

        self._proxy.judge = judge if how else lambda method, path: Verdict()

    def drop(self, node: str, percent: int) -> None:
        """Of the packets that come to a node or leave it, on both networks; 0 heals it."""
        nft = (*within(self.network.namespace(node)), "nft")
        if not percent:
            run(*nft, "delete table inet faults")
            return
        some = "drop" if percent == 100 else f"numgen random mod 100 < {percent} drop"
        which = [f'{way} {{ "storage", "compute" }} {some}' for way in ("iifname", "oifname")]
        run(
            *nft,
            "add table inet faults;"
            "add chain inet faults in { type filter hook input priority 0; };"
            "add chain inet faults out { type filter hook output priority 0; };"
            f"add rule inet faults in {which[0]}; add rule inet faults out {which[1]}",
        )

    def objects(self) -> tuple[Any, str]:
        """S3's files without the proxy between, and the folder that the cluster has there."""
        import s3fs  # slow to import

        files = s3fs.S3FileSystem(
            skip_instance_cache=True, use_listings_cache=False, **self.s3.options
        )
        return files, f"{self.s3.bucket}/{REMOTE_FOLDER}"


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def built_network() -> Network:
    network = Network(NODES, Rates(LINK_MBIT, LINK_MBIT))
    network.build()
    return network


def run(*command: str) -> str:
    """Its output; raises :class:`ClusterFailed`."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, env=_env()
    )
    if done.returncode:
        raise ClusterFailed(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _env() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}
