"""What the rounds come to: every goal by name, and the figures beside them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from rich.table import Table

from benchmarks.goals import Goal
from benchmarks.traffic.cluster import ClusterSample
from benchmarks.traffic.measure import Rounds, Sample

Pair = Callable[[Sample, Sample], float]


class Results(msgspec.Struct):
    """Samples of each arm, round by round; empty where nothing was measured."""

    link: Rounds = {}
    engine: Rounds = {}
    cluster: ClusterSample | None = None


def _kept(sample: Sample, control: Sample) -> float:
    return sample.high_rate / control.high_rate


def _later_ms(sample: Sample, control: Sample) -> float:
    return (sample.message_p99_s - control.message_p99_s) * 1e3


def _slower_percent(sample: Sample, control: Sample) -> float:
    return (sample.tpot_s / control.tpot_s - 1) * 100


def paired(rounds: Rounds, arm: str, control: str, pair: Pair) -> float | None:
    """Median over the rounds of what an arm is beside its control; None if not measured."""
    samples = list(zip(rounds.get(arm, []), rounds.get(control, []), strict=False))
    return statistics.median(pair(*both) for both in samples) if samples else None


def of_the_rest(rounds: Rounds) -> float | None:
    """KV movement's rate with classes, of what its rate alone is less inference's."""
    rows = zip(rounds.get("classes", []), rounds.get("kv alone", []), strict=False)
    shares = [sample.kv_rate / (alone.kv_rate - sample.high_rate) for sample, alone in rows]
    return statistics.median(shares) if shares else None


def make_goals(results: Results) -> list[Goal]:
    """All of the issue, measured or not."""
    link, engine = results.link, results.engine
    kept, whole = "high-class throughput", "when it wants the whole link"
    pacer = paired(link, "pacer alone", "control without classes", _kept)
    pacer_flood = paired(link, "pacer alone, flood", "control, flood", _kept)
    flood = paired(link, "classes, flood", "control, flood", _kept)
    later_ms = paired(link, "classes", "control", _later_ms)
    slower = paired(engine, "classes", "control", _slower_percent)
    return [
        Goal(
            f"{kept} with classes, of control",
            paired(link, "classes", "control", _kept),
            "",
            at_least=0.98,
        ),
        Goal(f"{kept} with classes {whole}, of control", flood, "", at_least=0.98),
        Goal("p99 of small messages with classes, above control", later_ms, "ms", at_most=2.0),
        Goal("KV movement with classes, of what is left", of_the_rest(link), "", at_least=0.95),
        Goal(f"{kept} with the pacer alone, of control", pacer, "", at_least=0.95),
        Goal(f"{kept} with the pacer alone {whole}, of control", pacer_flood, "", at_least=0.95),
        Goal("TPOT of a decode engine with classes, above control", slower, "%", at_most=5.0),
        *_cluster_goals(results.cluster),
    ]


def _cluster_goals(sample: ClusterSample | None) -> list[Goal]:
    """That each byte goes in its sender's class: fewer than were sent means that some went in
    the other one; a tenth more, that others' bytes (or more than headers) were among them."""
    low = high = others = None
    if sample is not None:
        low = sample.link_bytes["low"] / sample.moved_bytes["low"]
        high = sample.link_bytes["high"] / sample.moved_bytes["high"]
        others = sample.other_answers
    sent = "bytes in a cluster's queue, of what"
    return [
        Goal(f"low-class {sent} agents have sent", low, "", at_least=1.0),
        Goal(f"low-class {sent} agents have sent, at most", low, "", at_most=1.1),
        Goal(f"high-class {sent} engines have sent", high, "", at_least=1.0),
        Goal(
            "answers to a cluster's hits other than to the same prompts cold", others, "", at_most=0
        ),
    ]


def harm(results: Results) -> dict[str, float | None]:
    """Without classes and without the pacer, and what the pacer alone does not prevent."""
    link, plain = results.link, "control without classes"
    slower = {
        arm: paired(results.engine, arm, "control", _slower_percent)
        for arm in ("neither", "pacer alone")
    }
    return {
        "high-class throughput, of control": paired(link, "neither", plain, _kept),
        "high-class throughput when it wants the whole link, of control": paired(
            link, "neither, flood", "control, flood", _kept
        ),
        "p99 of small messages, above control, ms": paired(link, "neither", plain, _later_ms),
        "p99 of small messages with the pacer alone, above control, ms": paired(
            link, "pacer alone", plain, _later_ms
        ),
        "TPOT, above control, %": slower["neither"],
        "TPOT with the pacer alone, above control, %": slower["pacer alone"],
    }


FIELDS = ("high_rate", "kv_rate", "message_p50_s", "message_p99_s", "tpot_s")


def medians(rounds: Rounds) -> dict[str, dict[str, float]]:
    """Of each arm's fields."""
    return {
        arm: {field: _median(getattr(sample, field) for sample in samples) for field in FIELDS}
        for arm, samples in rounds.items()
        if samples
    }


def spread(rounds: Rounds) -> dict[str, dict[str, tuple[float, float]]]:
    """The least and the largest of each arm's fields."""
    return {
        arm: {
            field: (
                min(getattr(sample, field) for sample in samples),
                max(getattr(sample, field) for sample in samples),
            )
            for field in FIELDS
        }
        for arm, samples in rounds.items()
        if samples
    }


def _median(values: Iterable[float]) -> float:
    return float(statistics.median(values))


def table(results: Results) -> Table:
    """Medians of all arms."""
    shown = Table("arm", "inference MB/s", "KV MB/s", "message p50, p99 ms", "TPOT ms")
    for kind, rounds in (("", results.link), ("engine: ", results.engine)):
        for arm, of in medians(rounds).items():
            messages = f"{of['message_p50_s'] * 1e3:.2f}, {of['message_p99_s'] * 1e3:.2f}"
            shown.add_row(
                kind + arm,
                f"{of['high_rate'] / 1e6:.1f}" if of["high_rate"] else "-",
                f"{of['kv_rate'] / 1e6:.1f}",
                messages if of["message_p99_s"] else "-",
                f"{of['tpot_s'] * 1e3:.2f}" if of["tpot_s"] else "-",
            )
    return shown


def figures(results: Results) -> dict[str, Any]:
    """Everything else for the report."""
    return {
        "harm without either": harm(results),
        "medians": {"link": medians(results.link), "engine": medians(results.engine)},
        "least and largest": {"link": spread(results.link), "engine": spread(results.engine)},
        "rounds": msgspec.to_builtins(results),
    }
