"""What SGLang does with an engine that has lost one of its processes."""

from __future__ import annotations

from sglang.srt.environ import envs


def test_the_dumps_before_a_crash_can_be_switched_off(monkeypatch):
    for name in ("SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"):
        assert getattr(envs, name).get(), f"{name} is on by default: an engine is kept for 65 s"
        monkeypatch.setenv(name, "0")
        assert not getattr(envs, name).get()
