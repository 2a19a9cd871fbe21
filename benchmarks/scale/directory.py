"""What announcements and growth cost: the agent's announcer, the codec, the directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from benchmarks.scheduler import speed
from benchmarks.scheduler.cluster import PAPER, THOUSAND
from benchmarks.scheduler.speed import Speed
from common.block import KEY_BYTES, BlockKey, TierName
from common.ids import Incarnation
from common.messages.codec import Message, decode, encode
from common.messages.from_agents import Announcement, Holding
from scheduler.directory.directory import Directory
from transfer.agent.announcer import CHANGES_MAX, Announcer

AGENT = "agent-d0"
SMALL_BATCH = 64
SNAPSHOT_BLOCKS = 1_000_000
SAMPLED_BLOCKS = 200_000


class DirectoryCosts(msgspec.Struct, frozen=True):
    """CPU seconds; bytes."""

    change_bytes: float
    """Of a change, on the wire."""
    known_s: float
    """A change of a block that the directory has, in a large batch: decoded and applied."""
    known_small_s: float
    """The same in batches of 64."""
    new_s: float
    """Of one that an empty one, which grows, does not have, in a large batch."""
    announce_s: float
    """Of a change, at the agent."""
    growth_pause_s: float
    """The longest single application while the directory filled."""
    snapshot_pause_s: float
    """An agent with a million blocks begins to announce to a gateway that asks for all."""


class Planning(msgspec.Struct, frozen=True):
    """By number of nodes."""

    small: Speed
    large: Speed


def measure(
    blocks: int, plans: int, rounds: int, progress: Callable[[float], None]
) -> tuple[DirectoryCosts, Planning]:
    """With ``blocks`` in the directory; ``plans`` a round, at 144 and at 1,000 nodes in turns."""
    applied_s = [0.0]
    last_s = time.thread_time()

    def applied(part: float) -> None:
        nonlocal last_s
        now_s = time.thread_time()
        applied_s.append(now_s - last_s)
        progress(part)
        last_s = time.thread_time()

    directory, prompts = speed.full_directory(blocks, applied)
    loops = [speed.with_directory(*nodes, directory, prompts) for nodes in (PAPER, THOUSAND)]
    for _ in range(rounds):
        for loop in loops:
            loop.round(plans)
    costs = _announcements(directory, prompts, max(applied_s))
    return costs, Planning(*(loop.speed() for loop in loops))


def _announcements(
    directory: Directory, prompts: Iterator[list[BlockKey]], growth_pause_s: float
) -> DirectoryCosts:
    known: list[BlockKey] = []
    while len(known) < min(SAMPLED_BLOCKS, len(directory) // 4):
        known += next(prompts)
    frames: list[bytes] = []
    announcer = Announcer(Incarnation(1), _keeper(frames))
    begun_s = time.thread_time()
    announcer.subscribe(b"gateway", [Holding(key, TierName.DRAM, True) for key in known])
    snapshot_s = time.thread_time() - begun_s
    change_bytes = sum(map(len, frames)) / len(known)
    _apply(directory, frames)  # from now on the sets of holders are there
    large_s = _apply(directory, _renumbered(known, CHANGES_MAX)) / len(known)
    small = known[: len(known) // 4]
    small_s = _apply(directory, _renumbered(small, SMALL_BATCH)) / len(small)
    new = _new_keys(len(known))
    # As after a restart: into a table that grows from nothing.
    new_s = _apply(Directory(len(directory)), _renumbered(new, CHANGES_MAX)) / len(new)
    return DirectoryCosts(
        change_bytes=change_bytes,
        known_s=large_s,
        known_small_s=small_s,
        new_s=new_s,
        announce_s=snapshot_s / len(known),
        growth_pause_s=growth_pause_s,
        snapshot_pause_s=snapshot_s / len(known) * SNAPSHOT_BLOCKS,
    )


def _keeper(frames: list[bytes]) -> Callable[[bytes, Message], bool]:
    def send(identity: bytes, message: Message) -> bool:
        frames.append(encode(message))
        return True

    return send


def _renumbered(keys: list[BlockKey], batch: int) -> list[bytes]:
    """Frames that begin with a snapshot of one change, so that each series follows itself."""
    parts = [keys[:1], *(keys[at : at + batch] for at in range(0, len(keys), batch))]
    return [
        encode(
            Announcement(
                Incarnation(1), n, n == 0, [Holding(key, TierName.DRAM, True) for key in part]
            )
        )
        for n, part in enumerate(parts)
    ]


def _apply(directory: Directory, frames: list[bytes]) -> float:
    """CPU seconds of all but the first, which replaces what the agent has said before."""
    spent_s = 0.0
    for frame in frames:
        begun_s = time.thread_time()
        news = decode(frame)
        assert isinstance(news, Announcement)
        heard = directory.apply(AGENT, news.incarnation, news.sequence, news.snapshot, news.changes)
        assert heard
        spent_s += time.thread_time() - begun_s if news.sequence else 0.0
    return spent_s


def _new_keys(count: int) -> list[BlockKey]:
    raw = np.random.default_rng(1 << 40).bytes(count * KEY_BYTES)
    return [BlockKey(raw[at : at + KEY_BYTES]) for at in range(0, len(raw), KEY_BYTES)]
