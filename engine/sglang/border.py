"""How the border to SGLang is written down, so that a test can compare it with the installed
SGLang and ``docs/sglang.md`` can show it (:mod:`engine.sglang.tables`).

Three forms: a :class:`Hook` is a function of SGLang that calls us; a :class:`Use` is anything
else of SGLang that a file of this folder imports, calls, reads or replaces, listed in its
``USES``; a :func:`view` is what the rest of the engine sees of an SGLang object
(:mod:`engine.sglang.views`). All names are relative to ``sglang.srt``. This module imports
nothing of SGLang, which loads plugins before its own modules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar

ROOT = "sglang.srt."
Kind = Literal["before", "after", "around", "replace"]
_View = TypeVar("_View", bound=type)


class Hook(NamedTuple):
    """One function of SGLang's that calls one of ours."""

    target: str
    kind: Kind
    """SGLang's HookType, which says how ours is called."""
    hook: str
    """Ours, as ``module:function``."""
    why: str


class Use(NamedTuple):
    """One name of SGLang's, down to the attribute: ``managers.schedule_batch.Req.rid``."""

    name: str
    why: str
    keywords: tuple[str, ...] = ()
    """Of a function: the arguments that we pass by keyword."""


VIEWS: dict[type, tuple[str, ...]] = {}
"""View -> the SGLang classes whose objects are seen through it."""


def view(*names: str) -> Callable[[_View], _View]:
    """Mark a Protocol as what we see of SGLang's classes ``names``: each has all its members."""

    def mark(protocol: _View) -> _View:
        VIEWS[protocol] = names
        return protocol

    return mark


def install(hooks: Iterable[Hook]) -> None:
    """Have SGLang call them, from when it applies its plugins' hooks on."""
    from sglang.srt.plugins import hook_registry
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(ROOT + hook.target, _lazily(hook.hook), HookType[hook.kind.upper()])
        _ours.add(ROOT + hook.target)
    if not isinstance(HookRegistry._apply_target, _Strictly):
        HookRegistry._apply_target = _Strictly(HookRegistry._apply_target)
        hook_registry._propagate_patch = _functions_alone(hook_registry._propagate_patch)


def _functions_alone(propagate: Callable[..., int]) -> Callable[..., int]:
    """For ``_propagate_patch``, which looks for what was hooked among all names of all modules.
    It finds functions that they have imported, but no method of a class, which modules have by
    the class: a second of CPU time at each start."""

    def call(original: object, wrapped: object, owner: object) -> int:
        return 0 if isinstance(owner, type) else propagate(original, wrapped, owner)

    return call


_ours: set[str] = set()


class _Strictly:
    """Stands for ``HookRegistry._apply_target``, of whose errors SGLang makes a line in the log:
    an engine without one of our hooks is not to start."""

    def __init__(self, original: Callable[..., None]) -> None:
        self._original = original

    def __call__(self, target: str, hooks: list[Any]) -> None:
        try:
            self._original(target, hooks)
        except Exception as error:  # whatever it is, the function is not hooked
            if target not in _ours:
                raise
            raise SystemExit(f"DualPath cannot hook {target} of this SGLang: {error!r}") from error


def _lazily(hook: str) -> Callable[..., Any]:
    # Most modules of hooks import SGLang's, which are not to be imported yet.
    def call(*args: Any, **kwargs: Any) -> Any:
        return function_of(hook)(*args, **kwargs)

    return call


@cache
def function_of(hook: str) -> Callable[..., Any]:
    """What :attr:`Hook.hook` names."""
    module, name = hook.split(":")
    return getattr(importlib.import_module(module), name)


USES = (
    Use("plugins.hook_registry.HookRegistry.register", "hook a function"),
    Use("plugins.hook_registry.HookType", "the kinds of hooks"),
    Use("plugins.hook_registry.HookRegistry._apply_target", "its errors end the process"),
    Use("plugins.hook_registry._propagate_patch", "looks for functions alone, not for methods"),
)
