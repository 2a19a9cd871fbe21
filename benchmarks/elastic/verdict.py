"""What a run showed: from its records to its goals."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np

from benchmarks.clients.load import BROKEN, ERROR, REFUSED, RIGHT, SILENT, TIE, WRONG, Answer
from benchmarks.elastic.hosts import Left
from benchmarks.elastic.steps import DRAIN, GATEWAY, JOIN, KILL, NODES, Step
from benchmarks.goals import Goal

FIRST_SHARE_MAX_S = 5.0
"""After its start-up."""
DRAIN_MAX_S = 5.0
"""After the longest request that was under way meanwhile."""
ROLES = tuple(dict.fromkeys(NODES.values()))
LEFT_FIELDS = {
    "processes": "processes",
    "sockets": "sockets",
    "shared_files": "files in /dev/shm",
    "folders": "run folders",
    "secrets": "files with the secret",
}


class Done(msgspec.Struct):
    """A step that was done. Times are the monotonic clock's."""

    step: Step
    begun_s: float
    ended_s: float = 0.0
    """It serves; its process has ended; the other gateway has taken over."""
    share_s: float | None = None
    """Of a node that joined: when the first plan named it."""
    left: Left | None = None
    """Of a node that left or was killed: on its host."""
    failure: str = ""


class Records(msgspec.Struct):
    """All that a run has seen."""

    answers: list[Answer] = []
    done: list[Done] = []
    left_at_the_end: list[Left] = []
    """On all hosts, once every node had left."""

    def of(self, kind: str) -> list[Done]:
        return [done for done in self.done if done.step.kind == kind]


# ---- answers ------------------------------------------------------------------------------------


def names(answer: Answer) -> set[str]:
    """Nodes that its plan gave a part of the work to; a reader is its agent."""
    trace = answer.trace
    readers = {name.removeprefix("agent-") for name in trace.get("readers", {})}
    return {trace.get("prefill", ""), trace.get("decode", ""), *readers}


def gives_work(answer: Answer, node: str) -> bool:
    """An agent of an engine's node is at work before the engine is, which does not count."""
    if NODES[node] == "reader":
        return node in names(answer)
    return node == answer.trace.get(NODES[node])


def planned_s(answer: Answer) -> float:
    timings_s = answer.trace.get("timings_s", {})
    return answer.sent_s + sum(timings_s.get(name, 0.0) for name in ("tokenize", "queue"))


def first_share_s(answers: list[Answer], node: str, since_s: float) -> float | None:
    times_s = [planned_s(answer) for answer in answers if gives_work(answer, node)]
    return min((time_s for time_s in times_s if time_s > since_s), default=None)


def is_cut(records: Records, answer: Answer) -> bool:
    """What nobody could have saved: it had begun to answer the client when the node that it was
    at, or the gateway, was killed."""
    if answer.outcome == BROKEN:
        return _within(answer, records.of(GATEWAY))
    if answer.outcome != ERROR or not (answer.stream and answer.says.startswith("200")):
        return False
    killed = [done for done in records.of(KILL) if gives_work(answer, done.step.node)]
    return _within(answer, killed)


def _within(answer: Answer, done: list[Done]) -> bool:
    return any(answer.sent_s <= d.ended_s and d.begun_s <= answer.done_s for d in done)


def failed(records: Records) -> list[Answer]:
    outcomes = (ERROR, REFUSED, BROKEN, SILENT)
    return [a for a in records.answers if a.outcome in outcomes and not is_cut(records, a)]


# ---- steps --------------------------------------------------------------------------------------


def after_start_up_s(done: Done) -> float | None:
    """From the moment at which a node serves to its first share of work."""
    return None if done.share_s is None else max(0.0, done.share_s - done.ended_s)


def beyond_the_longest_s(records: Records, drain: Done) -> float:
    """How much longer than any request meanwhile a drain took."""
    under_way = [
        answer.done_s - answer.sent_s
        for answer in records.answers
        if answer.sent_s <= drain.ended_s and answer.done_s >= drain.begun_s
    ]
    return drain.ended_s - drain.begun_s - max(under_way, default=0.0)


def _worst(values: list[float | None]) -> float | None:
    """None if there is none, or one was not measured."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


# ---- goals --------------------------------------------------------------------------------------


def make_goals(records: Records) -> list[Goal]:
    wrong = sum(answer.outcome == WRONG for answer in records.answers)
    joins = [done for done in records.of(JOIN) if not done.failure]
    drains = [done for done in records.of(DRAIN) if not done.failure]
    shares_s = {
        role: _worst([after_start_up_s(d) for d in joins if NODES[d.step.node] == role])
        for role in ROLES
    }
    beyond_s = _worst([beyond_the_longest_s(records, drain) for drain in drains])
    failures = sum(bool(done.failure) for done in records.done)
    return [
        Goal("failed requests", len(failed(records)), "requests", 0),
        Goal("answers with a wrong token", wrong, "answers", 0),
        *(
            Goal(f"first share of work after start-up, {role}", value, "s", FIRST_SHARE_MAX_S)
            for role, value in shares_s.items()
        ),
        Goal("drain beyond the longest request", beyond_s, "s", DRAIN_MAX_S),
        *_left_over(records),
        Goal("steps that could not be done", failures, "steps", 0),
    ]


def _left_over(records: Records) -> list[Goal]:
    """Processes and sockets after each step; files of a node that was killed go with its next
    start, so that they are looked at when it has left."""
    drained = [done.left for done in records.of(DRAIN) if done.left is not None]
    killed = [done.left for done in records.of(KILL) if done.left is not None]
    ended = [*drained, *records.left_at_the_end]
    goals = []
    for field, what in LEFT_FIELDS.items():
        looked = [*ended, *killed] if field in ("processes", "sockets") else ended
        count = sum(len(getattr(left, field)) for left in looked) if looked else None
        if field == "sockets" and count is not None:  # nobody is there to close the other end
            count += sum(left.closing for left in records.left_at_the_end)
        goals.append(Goal(f"{what} left over", count, what.split()[0], 0))
    return goals


# ---- for the report -----------------------------------------------------------------------------


def figures(records: Records) -> dict[str, object]:
    """Beside the goals."""
    outcomes = Counter(answer.outcome for answer in records.answers)
    cut = [answer for answer in records.answers if is_cut(records, answer)]
    kinds = (RIGHT, WRONG, TIE, ERROR, REFUSED, BROKEN, SILENT)
    return {
        "reported": _reported(records, outcomes, len(cut)),
        "answers": {name: outcomes[name] for name in kinds},
        "cut_by_a_kill": len(cut),
        "request_s": _percentiles([a.done_s - a.sent_s for a in records.answers]),
        "start_up_s": {
            role: _percentiles(
                [d.ended_s - d.begun_s for d in records.of(JOIN) if NODES[d.step.node] == role]
            )
            for role in ROLES
        },
        "drain_s": _percentiles([d.ended_s - d.begun_s for d in records.of(DRAIN)]),
        "takeover_s": _percentiles([d.ended_s - d.begun_s for d in records.of(GATEWAY)]),
        "steps": [_shown_step(records, done) for done in records.done],
        "failed": [msgspec.to_builtins(answer) for answer in failed(records)[:50]],
        "wrong": [msgspec.to_builtins(a) for a in records.answers if a.outcome == WRONG][:50],
        "left_at_the_end": [msgspec.to_builtins(left) for left in records.left_at_the_end],
    }


def _reported(records: Records, outcomes: Counter[str], cut: int) -> dict[str, str]:
    """Rows of the page's table that are no goals."""
    rows = {
        "requests": f"{len(records.answers)}",
        "answers that are compared, ties": f"{outcomes[RIGHT] + outcomes[WRONG]}, {outcomes[TIE]}",
        "requests cut by a kill": f"{cut}",
        "time a request took": _spread([a.done_s - a.sent_s for a in records.answers]),
        "the other gateway answers after the kill": _spread(_took_s(records.of(GATEWAY))),
    }
    for role in ROLES:
        joins = [done for done in records.of(JOIN) if NODES[done.step.node] == role]
        rows[f"start-up, {role}"] = _spread(_took_s(joins))
        shares_s = [s for done in joins if (s := after_start_up_s(done)) is not None]
        rows[f"first share of work after it, {role}"] = _spread(shares_s)
    rows["drain, whole"] = _spread(_took_s(records.of(DRAIN)))
    return rows


def _took_s(done: list[Done]) -> list[float]:
    return [each.ended_s - each.begun_s for each in done]


def _spread(values_s: list[float]) -> str:
    if not values_s:
        return "-"
    p50, p95, most = np.percentile(values_s, (50, 95, 100))
    return f"{p50:.1f} s p50, {p95:.1f} s p95, {most:.1f} s longest, of {len(values_s)}"


def _shown_step(records: Records, done: Done) -> dict[str, object]:
    shown: dict[str, object] = msgspec.to_builtins(done.step)
    shown["took_s"] = round(done.ended_s - done.begun_s, 2)
    if done.step.kind == JOIN:
        shown["share_after_s"] = after_start_up_s(done)
    if done.step.kind == DRAIN:
        shown["beyond_the_longest_s"] = round(beyond_the_longest_s(records, done), 2)
    if done.left is not None:
        shown["left"] = msgspec.to_builtins(done.left)
    return shown | ({"failure": done.failure} if done.failure else {})


def _percentiles(values: list[float]) -> dict[str, float | None]:
    return {
        f"p{percent}": round(float(np.percentile(values, percent)), 2) if values else None
        for percent in (50, 95, 100)
    }
