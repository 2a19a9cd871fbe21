"""An engine of ours does not start where SGLang would only log that a part of us is missing."""

from __future__ import annotations

import sys
from collections import defaultdict
from types import ModuleType

import pytest
from sglang.srt.plugins import hook_registry
from sglang.srt.plugins.hook_registry import HookRegistry

from engine import plugin
from engine.config import EngineConfig
from engine.sglang import border
from engine.sglang.border import Hook


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """SGLang's, as in a new process."""
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(HookRegistry, "_apply_target", HookRegistry._apply_target)
    monkeypatch.setattr(hook_registry, "_propagate_patch", hook_registry._propagate_patch)
    monkeypatch.setattr(border, "_ours", set())


def hook(target: str) -> Hook:
    return Hook(target, "before", "engine.sglang.pool_hooks:before_available_size", "a test")


def test_a_hook_that_cannot_be_applied_ends_the_process_with_its_name():
    border.install([hook("managers.scheduler.Scheduler.of_another_version")])
    with pytest.raises(SystemExit, match="Scheduler.of_another_version"):
        HookRegistry.apply_hooks()


def test_hooks_of_other_plugins_are_left_to_sglang(monkeypatch):
    border.install([])
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.nowhere", print)
    HookRegistry.apply_hooks()


def test_a_function_is_hooked_wherever_it_was_imported_and_a_method_in_its_class(monkeypatch):
    """SGLang's modules import functions by name, and are there when the hooks come."""
    made_up = type("Class", (), {"method": lambda _: 1})
    owner, importer = ModuleType("sglang.srt.made_up"), ModuleType("sglang.srt.importer")
    vars(owner).update(function=_function, Class=made_up)
    vars(importer).update(taken=_function)
    for module in (owner, importer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    border.install(
        [
            Hook(f"made_up.{name}", "replace", f"{__name__}:_ours", "a test")
            for name in ("function", "Class.method")
        ]
    )
    HookRegistry.apply_hooks()
    called = [vars(owner)["function"](), vars(importer)["taken"](), made_up().method()]
    assert called == ["ours"] * 3


def _function():
    return "SGLang's"


def _ours(*_):
    return "ours"


def test_a_plugin_that_cannot_start_ends_the_process(monkeypatch):
    monkeypatch.setenv(EngineConfig.VARIABLE, "{")
    with pytest.raises(SystemExit, match="DualPath's plugin cannot start"):
        plugin.register()
