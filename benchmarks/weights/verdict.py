"""From records to goals."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from benchmarks.goals import Goal
from benchmarks.weights.cases import WITH_A_KILL, Case
from benchmarks.weights.judge import Judged
from benchmarks.weights.load import ABORTED, Piece
from benchmarks.weights.updates import Update

LATER_MAX_S = 1.0
ENGINES = 4


class Seen(msgspec.Struct):
    """One update, and the answers around it."""

    case: Case
    update: Update
    pieces: list[Piece]
    judged: Judged | None = None
    """Of the cluster's alone."""

    @property
    def first_token_s(self) -> float | None:
        """From the pause to the first token under the new weights."""
        times_s = [piece.first_token_s(self.update.version) for piece in self.pieces]
        known = [time_s for time_s in times_s if time_s is not None]
        return min(known) - self.update.begun_s if known else None

    @property
    def lost(self) -> list[str]:
        return [piece.lost for piece in self.pieces if piece.lost]

    @property
    def engines(self) -> set[str]:
        """That had a part in an answer to what was sent after the commit."""
        later = [piece for piece in self.pieces if piece.sent_s > self.update.committed_s]
        return {name for piece in later for name in piece.engines}


class Records(msgspec.Struct):
    """All that a run has seen."""

    plain: list[Seen] = []
    cluster: list[Seen] = []
    failures: list[str] = []


def plain_s(records: Records, case: Case) -> float | None:
    """The quickest of plain SGLang's: others have had the machine's noise as well."""
    times_s = [seen.first_token_s for seen in records.plain if seen.case == case.plain]
    return min((time_s for time_s in times_s if time_s is not None), default=None)


def later_s(records: Records, case: Case) -> float | None:
    """How much later than plain SGLang's the first token came, at worst; None if one of the two
    was not measured."""
    times_s = [seen.first_token_s for seen in records.cluster if seen.case == case]
    known = [time_s for time_s in times_s if time_s is not None]
    beside_s = plain_s(records, case)
    if beside_s is None or not known or len(known) < len(times_s):
        return None
    return max(known) - beside_s


def engines_after_a_kill(records: Records) -> int | None:
    """How many took part under the weights of the update behind the one with a kill."""
    kinds = [seen.case for seen in records.cluster]
    following = [
        seen
        for seen, before in zip(records.cluster[1:], kinds[:-1], strict=True)
        if before == WITH_A_KILL
    ]
    return min((len(seen.engines) for seen in following), default=None)


def make_goals(records: Records, cases: Sequence[Case]) -> list[Goal]:
    """``cases``: those that were to be measured."""
    goals = [
        Goal(
            f"{case.name}: first token under the new weights, later than plain SGLang's",
            later_s(records, case),
            "s",
            at_most=LATER_MAX_S,
        )
        for case in dict.fromkeys(cases)
    ]
    judged = [seen.judged for seen in records.cluster if seen.judged is not None]
    is_whole = len(judged) == len(records.cluster) >= len(cases)
    sent_after = sum(bool(each.others) for each in judged)
    lost = sum(len(seen.lost) for seen in records.cluster)
    counts = {
        "requests lost": lost,
        "tokens after the commit that plain SGLang with the new weights would not give": sum(
            each.after.wrong for each in judged
        ),
        "tokens before it that plain SGLang with the old weights would not give": sum(
            each.before.wrong for each in judged
        ),
    }
    goals += [
        Goal(name, count if is_whole else None, "", at_most=0) for name, count in counts.items()
    ]
    goals.append(
        Goal(
            "updates after which the old weights would have given other tokens, of all",
            sent_after / len(records.cluster) if is_whole and judged else None,
            "",
            at_least=1,
        )
    )
    if WITH_A_KILL in cases:
        killed = sum(seen.case == WITH_A_KILL for seen in records.cluster)
        goals += [
            Goal("engines killed in the midst of an update", killed, "", at_least=1),
            Goal(
                "engines that serve after the update behind that one",
                engines_after_a_kill(records),
                "",
                at_least=ENGINES,
            ),
        ]
    return goals


# ---- for the report -----------------------------------------------------------------------------


def figures(records: Records) -> dict[str, object]:
    """Beside the goals."""
    judged = [seen.judged for seen in records.cluster if seen.judged is not None]
    pieces = [piece for seen in records.cluster for piece in seen.pieces]
    later = [p for s in records.cluster for p in s.pieces if p.sent_s > s.update.committed_s]
    ties = sum(each.after.ties + each.before.ties for each in judged)
    hits, prompts = (
        sum(piece.cached_tokens for piece in later),
        sum(len(piece.prompt) for piece in later),
    )
    return {
        "reported": {
            "answers": f"{len(pieces)}",
            "of them cut by a pause": f"{sum(piece.reason == ABORTED for piece in pieces)}",
            "of them of two versions": f"{sum(len(piece.spans) > 1 for piece in pieces)}",
            "right tokens after a commit, before it": f"{_right(judged, 'after')}, "
            f"{_right(judged, 'before')}",
            "ties": f"{ties}",
            "tokens that went on from old KV, not compared": f"{sum(e.went_on for e in judged)}",
            "hits of what was sent after a commit, of its tokens": f"{hits}, {prompts}",
        },
        "plain": [_shown(seen) for seen in records.plain],
        "cluster": [_shown(seen) for seen in records.cluster],
        "failures": records.failures,
    }


def _right(judged: Sequence[Judged], which: str) -> int:
    return sum(getattr(each, which).right for each in judged)


def _shown(seen: Seen) -> dict[str, object]:
    update = seen.update
    return {
        "case": seen.case.name,
        "version": update.version,
        "first_token_s": _rounded(seen.first_token_s),
        "updated_s": round(update.updated_s - update.begun_s, 3),
        "committed_s": round(update.committed_s - update.begun_s, 3),
        "answers": len(seen.pieces),
        "cut": sum(piece.reason == ABORTED for piece in seen.pieces),
        "of_two_versions": sum(len(piece.spans) > 1 for piece in seen.pieces),
        "engines_after": sorted(seen.engines),
        "lost": seen.lost[:20],
        "judged": msgspec.to_builtins(seen.judged),
    }


def _rounded(value_s: float | None) -> float | None:
    return None if value_s is None else round(value_s, 3)
