"""``python -m transfer.check --ports``: every listener of the clusters that run here."""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table

from transfer.ports.listeners import listeners


def report(console: Console, as_json: bool) -> int:
    """The exit code: 0 if nobody is heard whom the configuration does not name, else 1."""
    found = listeners()
    if as_json:
        print(msgspec.json.encode(found).decode())
    else:
        table = Table("process", "pid", "listens at", "heard", title_justify="left")
        for one in found:
            table.add_row(one.owner, str(one.pid), one.where, one.protection)
        console.print(table if found else "no cluster of this user runs here")
    return int(any(one.is_open for one in found))
