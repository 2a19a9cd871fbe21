"""What a benchmark needs of the machine beside Python, looked for before anything is measured."""

from __future__ import annotations

import os
import shutil
import sys

PACKAGES = {
    "g++": "g++",
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "iperf3": "iperf3",
    "taskset": "util-linux",
    "mount": "mount",
    "umount": "mount",
    "findmnt": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "fsck.ext4": "e2fsprogs",
    "radosgw": "radosgw",
    "radosgw-admin": "radosgw",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
    "monmaptool": "ceph-common",
}
"""Debian's package of each program."""
ENGINES = ("g++",)
"""SGLang compiles its page hash at an engine's first look-up."""
NETWORK = ("ip", "tc", "iperf3")
DISKS = ("mount", "umount", "findmnt", "mkfs.ext4", "fsck.ext4")
S3_SERVER = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool")
CANNOT_RUN = 2
"""Exit status of a benchmark on a machine that lacks something."""


def missing(*programs: str) -> list[str]:
    """Those that are not on the path."""
    return [program for program in programs if shutil.which(program) is None]


def need(*programs: str, root: bool = False) -> None:
    """Ends this process, with a sentence and status 2, if one of them is missing, or if it has
    to be root's (for network namespaces) and is not. To be called first."""
    if absent := missing(*programs):
        packages = " ".join(sorted({PACKAGES[program] for program in absent}))
        _cannot_run(
            f"not found: {', '.join(absent)}; `make setup-test` installs what benchmarks need "
            f"(here the packages {packages}, by Debian's names)"
        )
    if root and os.geteuid() != 0:
        _cannot_run("network namespaces need root: run this as root")


def _cannot_run(why: str) -> None:
    print(why, file=sys.stderr)
    raise SystemExit(CANNOT_RUN)
