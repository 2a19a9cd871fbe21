"""What a campaign showed: from its records to its goals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
import numpy as np

from benchmarks.clients.load import BROKEN, ERROR, REFUSED, RIGHT, SILENT, TIE, WRONG, Answer
from benchmarks.faults.resources import Holdings
from benchmarks.faults.supervise import Event
from benchmarks.faults.watch import Look, lacked_role
from benchmarks.goals import Goal
from benchmarks.testbed.cluster import BLOCK_BYTES
from launch.gateway.request.suspects import REMEMBERED_S

AFTERMATH_S = 45.0
"""A process that ends so long after the end of a fault on itself was ended by it: the supervisor
waits 30 s for a sign of life."""
POISON = "This request ends the engine"
"""What the gateway says of a request that was at two engines when they died."""
STOPPING = "the gateway is stopping"
"""What it says of one that was waiting when the gateway was to end: a supervisor that does not come
up ends what it has started."""
DURABLE_TIERS = ("ssd", "remote")
GROWTH_MAX = 1.1
"""Of memory."""
MORE_SOCKETS_MAX = 1.2
"""Not every engine has met every agent after as many requests."""
FAILED = "failed: "
"""What is said of a fault that was not made, or not undone, begins so."""


class Done(msgspec.Struct, frozen=True):
    """A fault that was done. Times are the monotonic clock's."""

    kind: str
    target: str
    begun_s: float
    ended_s: float
    said: str


class Records(msgspec.Struct):
    """All that a campaign has seen."""

    engine_wait_s: float
    engines: list[str]
    faults: list[Done] = []
    answers: list[Answer] = []
    """Under faults."""
    looks: list[Look] = []
    events: list[Event] = []
    """Of the supervisor, while there were faults."""
    counted_from_s: float = 0.0
    """No byte has been damaged since."""
    missing: int | None = None
    """Since then: blocks gone when they were to be read."""
    last_answers: list[Answer] = []
    """To each conversation's last turn, after all had healed and every process was restarted."""
    first: Holdings | None = None
    last: Holdings | None = None
    left: Holdings | None = None
    """After the last fault, before the last restart of every process."""


# ---- answers ------------------------------------------------------------------------------------


def unexcused(records: Records) -> list[Answer]:
    """Errors that no lack of engines explains."""
    errors = [a for a in records.answers if a.outcome in (ERROR, REFUSED, BROKEN)]
    return [answer for answer in errors if not _excused(records, answer)]


def _excused(records: Records, answer: Answer) -> bool:
    if answer.outcome == REFUSED:
        return POISON in answer.says and _engines_ended(records, answer) >= 2
    if answer.outcome == BROKEN or STOPPING in answer.says:
        return _overlaps(records, answer, ("gateway", "supervisor"))
    if answer.stream and answer.says.startswith("200"):  # after the first token
        engines = {answer.trace.get("prefill", ""), answer.trace.get("decode", "")}
        return _overlaps(records, answer, engines)
    since_s, until_s = answer.sent_s, answer.done_s
    return lacked_role(records.looks, since_s, until_s, records.engine_wait_s)


def _engines_ended(records: Records, answer: Answer) -> int:
    """By us, for as long as the gateway remembers: such a request looks like one that did it."""
    return sum(
        fault.kind in ("kill", "kill-part", "suspend")
        and fault.target.partition("/")[0] in records.engines
        and answer.done_s - REMEMBERED_S <= fault.begun_s <= answer.done_s
        for fault in records.faults
    )


def _overlaps(records: Records, answer: Answer, names: Any) -> bool:
    """Whether one of these was ended, or suspended, while the request was under way."""
    kinds = ("kill", "kill-part", "kill-supervisor", "suspend")
    return any(
        fault.kind in kinds
        and fault.target.partition("/")[0] in {*names, "supervisor"}
        and fault.begun_s <= answer.done_s
        and fault.ended_s + AFTERMATH_S >= answer.sent_s
        for fault in records.faults
    )


def first_right_s(records: Records) -> list[float]:
    """After each fault: until the end of the first right answer to what was asked after it."""
    right = [answer for answer in records.answers if answer.outcome == RIGHT]
    found = []
    for fault in records.faults:
        ends = [answer.done_s for answer in right if answer.sent_s >= fault.begun_s]
        if ends:
            found.append(min(ends) - fault.begun_s)
    return found


# ---- engines ------------------------------------------------------------------------------------


def ended_by_requests(records: Records) -> list[Event]:
    """Ends of engines that are no doing of ours."""
    return [
        event
        for event in records.events
        if event.what == "restarting"
        and event.name in records.engines
        and not _ours(records, event)
    ]


def _ours(records: Records, event: Event) -> bool:
    kinds = ("kill", "kill-part", "suspend", "partition", "loss")
    return any(
        fault.kind in kinds
        and fault.target.partition("/")[0] == event.name
        and fault.begun_s <= event.time_s <= fault.ended_s + AFTERMATH_S
        for fault in records.faults
    )


# ---- durable blocks -----------------------------------------------------------------------------


def durable_blocks(answer: Answer) -> int:
    """Blocks from a prompt's begin on that were read from a durable tier, all of them."""
    hit = answer.trace.get("hit_blocks", 0)
    readers = answer.trace.get("readers", {}).values()
    read_bytes = sum(
        reader["read_bytes"].get(tier, 0) for reader in readers for tier in DURABLE_TIERS
    )
    return hit if hit and read_bytes >= hit * BLOCK_BYTES else 0


def lost_blocks(records: Records) -> int:
    """Blocks that were durable after the last damaged byte, and are not hit at the end. Not those
    that were read while a disk was full: it gives space back, so they may have gone with it."""
    full = [(f.begun_s, f.ended_s) for f in records.faults if f.kind == "full-disk"]
    durable: Counter[tuple[int, str]] = Counter()
    for answer in records.answers:
        if any(begun_s <= answer.sent_s <= ended_s for begun_s, ended_s in full):
            continue
        if answer.sent_s >= records.counted_from_s and answer.version in ("", "default"):
            key = answer.conversation, answer.salt
            durable[key] = max(durable[key], durable_blocks(answer))
    hits = {(a.conversation, a.salt): a.trace.get("hit_blocks", 0) for a in records.last_answers}
    return sum(max(0, blocks - hits.get(key, 0)) for key, blocks in durable.items())


# ---- goals --------------------------------------------------------------------------------------


def make_goals(records: Records) -> list[Goal]:
    everything = [*records.answers, *records.last_answers]
    outcomes = Counter(answer.outcome for answer in everything)
    missing = None if records.missing is None else records.missing + lost_blocks(records)
    ended = len(ended_by_requests(records))
    return [
        Goal("answers with a wrong token", outcomes[WRONG], "answers", 0),
        Goal("requests without an answer after 60 s", outcomes[SILENT], "requests", 0),
        Goal("errors while each role had an engine", len(unexcused(records)), "answers", 0),
        Goal("durable blocks that were missing later", missing, "blocks", 0),
        Goal("engines that ended by themselves or by a request", ended, "engines", 0),
        Goal("faults that could not be made or undone", len(failed(records)), "faults", 0),
        *_leaks(records),
    ]


def _leaks(records: Records) -> list[Goal]:
    first, left, last = records.first, records.left, records.last
    if first is None or left is None or last is None:
        return [Goal("what is held at the end was looked at", None, "", 0)]
    files = len(set(last.shared_files)) - len(set(first.shared_files))
    sockets = sum(last.sockets.values()) / sum(first.sockets.values())
    memory = sum(last.memory_bytes.values()) / sum(first.memory_bytes.values())
    return [
        Goal("pages held after the last fault", left.pages_taken, "pages", 0),
        Goal("DRAM slots held after the last fault", left.slots_taken, "slots", 0),
        Goal("more files in /dev/shm than at the start", files, "files", 0),
        Goal("sockets, end / start", sockets, "ratio", MORE_SOCKETS_MAX),
        Goal("memory, end / start", memory, "ratio", GROWTH_MAX),
    ]


def failed(records: Records) -> list[Done]:
    """Faults that were not made, or not undone."""
    return [fault for fault in records.faults if fault.said.startswith(FAILED)]


def figures(records: Records) -> dict[str, Any]:
    """For the report, beside the goals."""
    after_s = first_right_s(records)
    restarts = Counter(e.name for e in records.events if e.what == "restarting")
    names = (RIGHT, WRONG, TIE, ERROR, REFUSED, BROKEN, SILENT)
    outcomes = Counter(answer.outcome for answer in records.answers)
    return {
        "answers": {name: outcomes[name] for name in names},
        "faults": dict(Counter(fault.kind for fault in records.faults)),
        "failed_faults": msgspec.to_builtins(failed(records)),
        "restarts": dict(restarts),
        "first_right_answer_after_a_fault_s": {
            f"p{percent}": round(float(np.percentile(after_s, percent)), 2) if after_s else None
            for percent in (50, 95, 100)
        },
        "unexcused": [_shown(answer) for answer in unexcused(records)[:50]],
        "wrong": [_shown(answer) for answer in records.answers if answer.outcome == WRONG],
        "ended_by_requests": [msgspec.to_builtins(e) for e in ended_by_requests(records)],
        "holdings": {
            name: msgspec.to_builtins(getattr(records, name)) for name in ("first", "left", "last")
        },
    }


def _shown(answer: Answer) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(answer)
    return fields
