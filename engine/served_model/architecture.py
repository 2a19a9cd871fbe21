"""The class that SGLang has for the architecture which the model's ``config.json`` names."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path

import sglang.srt.models
from sglang.srt.runtime_context import get_model


def classes_of(model: Path) -> list[type]:
    """Empty where the model is not in a folder or SGLang has no class by that name: SGLang
    then looks through all of its own."""
    config = model / "config.json"
    architectures = json.loads(config.read_bytes())["architectures"] if config.exists() else []
    return [found for name in architectures for found in _defined(name)]


def _defined(name: str) -> Iterator[type]:
    (folder,) = sglang.srt.models.__path__
    for file in sorted(Path(folder).glob("*.py")):
        if f"\nclass {name}(" in file.read_text():
            module = importlib.import_module(f"sglang.srt.models.{file.stem}")
            entry = getattr(module, "EntryClass", [])
            classes = entry if isinstance(entry, list) else [entry]
            yield from (found for found in classes if found.__name__ == name)


EntryClass = classes_of(Path(get_model().model_path))
