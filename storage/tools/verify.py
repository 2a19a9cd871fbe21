"""``verify``: every checksum of a store, from where an earlier run has ended."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from common.block import BlockKey
from storage.index.owners import Selector
from storage.tiers.contract import BlockCorrupt, BlockMissing
from storage.tools.look import chosen
from storage.tools.progress import in_threads, progress_bar
from storage.tools.view import StoredBlock, StoreUnusable, StoreView

SAVE_EVERY_BLOCKS = 1000


class Damage(msgspec.Struct, frozen=True):
    """A block that is not what it says."""

    key: str
    where: str
    reason: str


class Verified(msgspec.Struct):
    """What was read and checked."""

    url: str
    blocks: int = 0
    payload_bytes: int = 0
    gone: int = 0
    """Evicted since they were listed, or of another format version."""
    damaged: list[Damage] = []


class Progress(Verified):
    """How far a run has come: the keys up to ``through``, in their order, are done."""

    through: bytes = b""

    def save(self, path: Path) -> None:
        temporary = path.with_name(path.name + ".new")
        temporary.write_bytes(msgspec.json.encode(self))
        os.replace(temporary, path)


def verify(view: StoreView, selector: Selector | None, resume: Path | None) -> Verified:
    """Read and check every block. ``resume``: a file that says how far it came; written as it
    goes, read at the start, removed at the end."""
    done = _begin(view, resume)
    blocks = sorted(
        (block for block in chosen(view, selector) if block.key > done.through),
        key=lambda block: block.key,
    )

    def check(block: StoredBlock) -> tuple[StoredBlock, Exception | None]:
        try:
            view.read(block)
        except (BlockCorrupt, BlockMissing, OSError) as error:
            return block, error
        return block, None

    with progress_bar("verify", sum(block.payload_bytes for block in blocks)) as advance:
        for number, (block, error) in enumerate(in_threads(check, blocks), 1):
            _note(done, block, error)
            advance(block.payload_bytes)
            if resume is not None and number % SAVE_EVERY_BLOCKS == 0:
                done.save(resume)
    if resume is not None:
        resume.unlink(missing_ok=True)
    return Verified(done.url, done.blocks, done.payload_bytes, done.gone, done.damaged)


def _begin(view: StoreView, resume: Path | None) -> Progress:
    if resume is None or not resume.exists():
        return Progress(view.url)
    try:
        done = msgspec.json.decode(resume.read_bytes(), type=Progress)
    except msgspec.DecodeError as error:
        raise StoreUnusable(f"{resume} says nothing of a verification: {error}") from error
    if done.url != view.url:
        raise StoreUnusable(f"{resume} is of {done.url}, not of {view.url}")
    return done


def _note(done: Progress, block: StoredBlock, error: Exception | None) -> None:
    done.through = BlockKey(block.key)
    if isinstance(error, BlockMissing):
        done.gone += 1
        return
    done.blocks += 1
    done.payload_bytes += block.payload_bytes
    if error is not None:
        done.damaged.append(Damage(block.key.hex(), block.where, str(error)))
