"""An engine of ours does not start where SGLang would only log that a part of us is missing."""

from __future__ import annotations

from collections import defaultdict

import pytest
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


def test_a_plugin_that_cannot_start_ends_the_process(monkeypatch):
    monkeypatch.setenv(EngineConfig.VARIABLE, "{")
    with pytest.raises(SystemExit, match="DualPath's plugin cannot start"):
        plugin.register()
