"""Rates of the SSD tier of the tree in which this runs: for each line ``read`` or ``write`` on its
standard input, one of bytes a second. ``store_worker.py FOLDER BLOCK_BYTES BLOCKS``, by its path,
so that every import is that tree's."""

import sys
from pathlib import Path

from benchmarks.store.load import Memory, SsdLoad
from storage.tiers.io_threads import SWITCH_INTERVAL_S


def main(folder: Path, block_bytes: int, blocks: int) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)  # as in an agent
    load = SsdLoad(folder, block_bytes, blocks, Memory(64 * block_bytes))
    for line in sys.stdin:
        print(load.read() if line.strip() == "read" else load.write(), flush=True)
    load.tier.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
