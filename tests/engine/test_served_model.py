"""Of SGLang's models only the one that is served is imported."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def architecture(monkeypatch, tmp_path):
    """The module as SGLang imports it, for a model in ``tmp_path``."""

    def of(*names: str):
        (tmp_path / "config.json").write_text(json.dumps({"architectures": names}))
        served = SimpleNamespace(model_path=str(tmp_path))
        monkeypatch.setattr("sglang.srt.runtime_context.get_model", lambda: served)
        from engine.served_model import architecture

        return importlib.reload(architecture)

    return of


def test_the_served_models_class_is_the_entry(architecture):
    from sglang.srt.models.qwen2 import Qwen2ForCausalLM

    assert architecture("Qwen2ForCausalLM").EntryClass == [Qwen2ForCausalLM]


def test_what_is_not_found_is_left_to_sglang(architecture):
    module = architecture("NoSuchModel")
    assert module.EntryClass == []
    assert module.classes_of(Path("organisation/name-on-a-hub")) == []
