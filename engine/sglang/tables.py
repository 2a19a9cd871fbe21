"""The tables of ``docs/sglang.md``: ``python -m engine.sglang.tables`` writes them anew."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from engine import sglang as border_folder
from engine.sglang import hooks
from engine.sglang.border import VIEWS, Hook, Use

PAGE = Path(__file__).parents[2] / "docs" / "sglang.md"
BEGIN = "<!-- border: python -m engine.sglang.tables -->"
END = "<!-- /border -->"


def modules() -> list[ModuleType]:
    """Every module of the border; importing them imports SGLang."""
    found = pkgutil.walk_packages(border_folder.__path__, border_folder.__name__ + ".")
    return [importlib.import_module(module.name) for module in found]


def all_hooks() -> list[tuple[str, Hook]]:
    """With the engines that have it."""
    tables = (("both", hooks.EVERY_ENGINE), ("P", hooks.PREFILL), ("D", hooks.DECODE))
    return [(engine, hook) for engine, table in tables for hook in table]


def uses_of(module: ModuleType) -> tuple[Use, ...]:
    """What a module declares."""
    return getattr(module, "USES", ())


def members(view: type) -> list[str]:
    """Attributes and methods of a view."""
    return [
        name
        for base in reversed(view.__mro__)
        if base in VIEWS
        for name in dict.fromkeys([*inspect.get_annotations(base), *vars(base)])
        if not name.startswith("_")
    ]


def markdown() -> str:
    """What stands between the marks in the page."""
    found = modules()
    return "\n".join([BEGIN, *_hook_rows(), *_use_rows(found), *_view_rows(), END])


def _hook_rows() -> Iterator[str]:
    yield from (
        "### Hooks",
        "",
        "| SGLang name | kind | engine | why |",
        "| --- | --- | --- | --- |",
    )
    for engine, hook in all_hooks():
        yield f"| `{hook.target}` | {hook.kind} | {engine} | {hook.why} |"


def _use_rows(found: list[ModuleType]) -> Iterator[str]:
    yield from ("", "### Used beside the hooks", "")
    yield from ("| file | SGLang name | why |", "| --- | --- | --- |")
    for module in found:
        file = module.__name__.removeprefix("engine.sglang.").replace(".", "/") + ".py"
        for use in uses_of(module):
            yield f"| `{file}` | `{use.name}` | {use.why} |"


def _view_rows() -> Iterator[str]:
    yield from ("", "### Seen by the rest of the engine", "")
    yield from ("| SGLang class | members | what it is to us |", "| --- | --- | --- |")
    for view, names in VIEWS.items():
        classes, seen = (", ".join(f"`{name}`" for name in some) for some in (names, members(view)))
        meaning = " ".join((inspect.getdoc(view) or "").split("\n\n")[0].split())
        yield f"| {classes} | {seen} | `{view.__name__}`: {meaning} |"


def page_with(tables: str) -> str:
    """The page, with these tables in the place of those that it has."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + tables + rest.split(END)[1]


if __name__ == "__main__":
    os.environ.setdefault("SGLANG_PLATFORM", "dualpath_cpu")
    PAGE.write_text(page_with(markdown()))
