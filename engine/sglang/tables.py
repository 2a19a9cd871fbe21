"""The tables of ``docs/sglang.md``: ``python -m engine.sglang.tables`` writes them anew."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from sglang.srt.platforms import current_platform  # noqa: F401 - see USES

from engine import sglang as border_folder
from engine.sglang import hooks
from engine.sglang.border import VIEWS, Hook, Use
from engine.sglang.cpu import hooks as cpu_hooks
from engine.sglang.states import hooks as state_hooks

PAGE = Path(__file__).parents[2] / "docs" / "sglang.md"
BEGIN = "<!-- border: python -m engine.sglang.tables -->"
END = "<!-- /border -->"
HOOKS: dict[str, tuple[Hook, ...]] = {
    "both": hooks.EVERY_ENGINE + state_hooks.EVERY_ENGINE,
    "P": hooks.PREFILL + state_hooks.PREFILL,
    "D": hooks.DECODE,
    "CPU": cpu_hooks.EVERY_ENGINE
    + cpu_hooks.UNLIKE_SIZES
    + cpu_hooks.ATTENTION_GROUPS
    + cpu_hooks.SPARSE_ATTENTION
    + cpu_hooks.COMPRESSED_ATTENTION
    + cpu_hooks.RECURRENT_LAYERS,
}
"""By the engines that have them; the last on the platform ``dualpath_cpu`` only."""


USES = (
    Use(
        "platforms.current_platform",
        "imported first: choosing it imports one of the border's modules",
    ),
)


def modules() -> list[ModuleType]:
    """Every module of the border; importing them imports SGLang."""
    found = pkgutil.walk_packages(border_folder.__path__, border_folder.__name__ + ".")
    return [importlib.import_module(module.name) for module in found]


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
    for engine, table in HOOKS.items():
        for hook in table:
            yield f"| `{hook.target}` | {hook.kind} | {engine} | {hook.why} |"


def _use_rows(found: list[ModuleType]) -> Iterator[str]:
    yield from ("", "### Used beside the hooks")
    for module in found:
        if uses := uses_of(module):
            file = module.__name__.removeprefix("engine.sglang.").replace(".", "/") + ".py"
            yield from ("", f"| `{file}` | why |", "| --- | --- |")
            yield from (f"| `{use.name}` | {use.why} |" for use in uses)


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
    PAGE.write_text(page_with(markdown()))
