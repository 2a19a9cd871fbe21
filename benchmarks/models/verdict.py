"""What was aimed at, of what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from benchmarks.goals import Goal
from benchmarks.models.before import DELIVERY, STORE_READS, STORE_WRITES, Pairs, ratio_of
from benchmarks.models.walk import COLD, KILLED, Asked, Control, Measured

PROMPTS_MIN = 30
HIT_MIN, READ_MAX, ACCEPTANCE_MIN = 0.95, 1.02, 0.98
WITHOUT_DRAFT_MAX = 0.8
"""Acceptance behind a control of a draft, of plain SGLang's: it is seen below this."""
SPEED_MIN = 0.97


def goals_of(family: str, found: Measured | None) -> list[Goal]:
    """None: it could not be measured."""
    asked = found.asked if found else []
    goals = [
        Goal(f"{family}: prompts", _prompts(asked) or None, "", at_least=PROMPTS_MIN),
        Goal(
            f"{family}: answers that differ from plain SGLang's",
            sum(not each.right for each in asked) if found else None,
            "",
            at_most=0,
        ),
        Goal(
            f"{family}: hits / longest possible ones, later turns",
            hit_ratio(asked),
            "",
            at_least=HIT_MIN,
        ),
        Goal(
            f"{family}: bytes read / bytes of the parts needed",
            read_ratio(asked),
            "",
            at_most=READ_MAX,
        ),
        Goal(
            f"{family}: controls seen, of all",
            seen_ratio(found.controls) if found else None,
            "",
            at_least=1,
        ),
        Goal(
            f"{family}: readers killed in mid-delivery",
            found.readers_killed if found else None,
            "",
            at_least=2,
        ),
    ]
    if found and found.has_draft:
        cold = [each for each in asked if each.cached_tokens == 0 and each.what != KILLED]
        restored = [each for each in asked if each.cached_tokens and each.what != KILLED]
        for name, those in (("cold", cold), ("restored", restored)):
            name = f"{family}: acceptance {name}, of plain SGLang's"
            goals.append(Goal(name, acceptance_ratio(those), "", at_least=ACCEPTANCE_MIN))
    return goals


def speed_goals(speeds: dict[str, Pairs]) -> list[Goal]:
    """Of plain models, this tree's speed over that of one before there were parts."""
    return [
        Goal(
            f"plain models: {name}, of before parts",
            ratio_of(speeds, name),
            "x",
            at_least=SPEED_MIN,
        )
        for name in (STORE_READS, STORE_WRITES, DELIVERY)
    ]


def _prompts(asked: Sequence[Asked]) -> int:
    return len({(each.conversation, each.turn) for each in asked})


def hit_ratio(asked: Sequence[Asked]) -> float | None:
    """In all passes; what is longer than the turns before have left counts as that."""
    later = [each for each in asked if each.longest_tokens and each.what != KILLED]
    hits = sum(min(each.cached_tokens, each.longest_tokens) for each in later)
    longest = sum(each.longest_tokens for each in later)
    return hits / longest if longest else None


def read_ratio(asked: Sequence[Asked]) -> float | None:
    needed = sum(each.needed_bytes for each in asked)
    return sum(each.read_bytes for each in asked) / needed if needed else None


def seen_ratio(controls: Sequence[Control]) -> float | None:
    return sum(map(is_seen, controls)) / len(controls) if controls else None


def is_seen(control: Control) -> bool:
    """Every answer was a hit of spoilt objects, and other tokens (of a faint control one of them);
    behind a spoilt draft the same tokens, of which hardly any were the draft's."""
    if not control.objects or control.hits < control.asked:
        return False
    if control.accepted_plain:
        return not control.differ and control.accepted < WITHOUT_DRAFT_MAX * control.accepted_plain
    return control.differ == control.asked or (control.faint and control.differ > 0)


def acceptance_ratio(asked: Sequence[Asked]) -> float | None:
    plain = sum(each.accepted_plain for each in asked)
    return sum(each.accepted for each in asked) / plain if plain else None


def summary(found: Measured) -> dict[str, object]:
    """Figures beside the goals."""
    passes = Counter(f"{each.what}, {each.policy}" for each in found.asked)
    wrong = [each for each in found.asked if not each.right]
    cold = [each.cached_tokens for each in found.asked if each.what == COLD and each.turn == 0]
    return {
        "seconds": round(sum(found.steps_s.values())),
        "steps_s": found.steps_s,
        "requests": dict(passes),
        "wrong": wrong,
        "read too much": [each for each in found.asked if each.read_bytes > each.needed_bytes],
        "hits of first turns, cold": sum(cold),
        "controls": found.controls,
        "object_bytes": found.object_bytes,
    }
