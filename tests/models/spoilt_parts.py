"""Objects of parts on the SSDs of a cluster's agents, with noise in place of what they held."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np

from storage.block_format import HEADER_BYTES, encode_header
from storage.tools.ssd_view import SsdView
from tests.cluster import Cluster


def spoil_parts(cluster: Cluster, folder: Path, kind: str, is_checked: bool) -> None:
    """Of all parts of a kind, while no agent runs; agents and engines have nothing in memory then.
    With checksums that are right, unless they are to find it."""
    for agent in ("agent-p0", "agent-d0"):
        cluster.signal(agent, signal.SIGSTOP)
    assert _spoil(folder, kind, is_checked)
    cluster.restart_agents()
    cluster.flush_engines()


def _spoil(folder: Path, kind: str, is_checked: bool) -> int:
    """Returns how many objects there are."""
    count = 0
    for state in folder.rglob("state"):
        view = SsdView(state.parent)
        for block in view.blocks():
            if not block.label.part.startswith(kind):
                continue
            header, _ = view.read(block)
            number, slot = block.place
            rng = np.random.default_rng([count, is_checked])
            noise = rng.normal(0, 3, block.payload_bytes // 4).astype(np.float32).tobytes()
            head = encode_header(block.key, noise, header.label, header.sequence, header.written_ms)
            slab = view.slabs[number]
            with slab.file.path.open("r+b") as file:
                file.seek(slab._at(slot) + (HEADER_BYTES if is_checked else 0))
                file.write(noise if is_checked else head + noise)
            count += 1
        view.close()
    return count
