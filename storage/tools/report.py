"""What ``storage.cli`` found, as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from rich.console import Console
from rich.table import Table

from common.json import JsonObject
from common.sizes import format_size
from storage.tools.finding import Finding, Verdict
from storage.tools.look import BlockLine, StoreContent
from storage.tools.verify import Verified

DIGEST_CHARS = 12
_STYLES = {Verdict.GOOD: "green", Verdict.DOUBTFUL: "yellow", Verdict.BAD: "red"}


def stats(console: Console, result: StoreContent) -> None:
    """Of :func:`storage.tools.look.stats`."""
    used_by, capacity_bytes = result.used_by, result.capacity_bytes
    console.print(
        f"{result.url} ({result.kind}" + (f", in use by process {used_by})" if used_by else ")"),
        f"\n{result.blocks} blocks, {format_size(result.payload_bytes)}"
        + (f" in slabs of {format_size(capacity_bytes)}" if capacity_bytes else ""),
        f"\nparent not in this store: {result.parent_elsewhere_blocks} blocks",
        highlight=False,
    )
    console.print(*(f"{name}: {text}\n" for name, text in result.notes.items()), sep="", end="")
    for name, total in result.parts.items():
        size = format_size(total.payload_bytes)
        console.print(f"of them part {name}: {total.objects}, {size}", highlight=False)
    table = Table("namespace", "model", "version", "tenant", "blocks", "size", title="Owners")
    for owner in result.owners:
        table.add_row(
            owner.namespace[:DIGEST_CHARS],
            owner.model[:DIGEST_CHARS],
            owner.version,
            owner.tenant_digest,
            str(owner.blocks),
            format_size(owner.payload_bytes),
        )
    console.print(table)
    mapping(
        console,
        {f"written {age}" if age != "unknown" else age: n for age, n in result.ages.items() if n},
    )
    if result.counters is not None:
        counted = msgspec.convert(result.counters["stats"], JsonObject)
        shown = ("hits_total", "missing_blocks_total", "corrupt_blocks_total", "evictions_total")
        mapping(console, {name: counted[name] for name in shown})


def findings(console: Console, result: Sequence[Finding]) -> None:
    """Of :func:`storage.tools.doctor.doctor`."""
    table = Table("check", "", "found", "what to do", title="doctor")
    for finding in result:
        style = _STYLES[finding.verdict]
        verdict = f"[{style}]{finding.verdict.value}"
        table.add_row(finding.check, verdict, finding.found, finding.advice)
    console.print(table)


def blocks(console: Console, result: Sequence[BlockLine]) -> None:
    """Of :func:`storage.tools.look.ls`: one line a block, whole keys."""
    for row in result:
        console.print(
            row.key,
            row.part or "block",
            row.payload_bytes,
            row.version or "-",
            row.tenant_digest or "-",
            row.where,
            highlight=False,
            soft_wrap=True,
        )


def verified(console: Console, result: Verified) -> None:
    """Of :func:`storage.tools.verify.verify`."""
    mapping(console, {**msgspec.structs.asdict(result), "damaged": len(result.damaged)})
    for place in result.damaged:
        console.print(place.key, place.where, place.reason, style="red", soft_wrap=True)


def mapping(console: Console, result: Mapping[str, object]) -> None:
    """Names and values, one a line."""
    for name, value in result.items():
        if name.endswith("_bytes") and isinstance(value, int):
            value = format_size(value)
        console.print(f"{name}: {value}", highlight=False, markup=False)
    if not result:
        console.print("nothing")
