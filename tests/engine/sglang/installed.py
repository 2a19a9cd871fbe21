"""What the installed SGLang has: functions, classes, and attributes of their objects."""

import ast
import importlib
import inspect
import textwrap
from functools import cache
from types import ModuleType

import msgspec

from engine.sglang.border import ROOT


class Missing(Exception):
    """The installed SGLang has no such name."""


def find(name: str) -> object:
    """What ``name``, relative to ``sglang.srt``, stands for; of an attribute that objects of a
    class get when they are made, None. Raises :class:`Missing`."""
    parts = (ROOT + name).split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not isinstance(found, ModuleType | type):
                raise Missing(f"{name}: {part} is not looked for in {found!r}")
            if hasattr(found, part):
                found = getattr(found, part)
            elif isinstance(found, type) and part in attributes(found):
                found = None
            else:
                raise Missing(f"{name}: {found.__name__} has no {part}")
        return found
    raise Missing(name)


def function(name: str):
    """The function that ``name`` stands for, without the wraps of decorators."""
    found = find(name)
    assert inspect.isroutine(found) or isinstance(found, type), f"{name} is no function"
    return inspect.unwrap(found)


@cache
def attributes(owner: type) -> frozenset[str]:
    """Names of what its objects have: fields, and what a method of it or a base assigns."""
    names: set[str] = set()
    for base in owner.__mro__:
        if base is object or base.__module__ == "builtins":
            continue
        names.update(inspect.get_annotations(base), getattr(base, "__slots__", ()))
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError):  # of an extension module
            continue
        names.update(
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        )
    if issubclass(owner, msgspec.Struct):
        names.update(owner.__struct_fields__)
    return frozenset(names)


def accepts(name: str, keywords) -> list[str]:
    """Those of the keywords that a function does not take."""
    parameters = inspect.signature(function(name)).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return []
    by_name = {p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY}
    return [keyword for keyword in keywords if keyword not in by_name]
