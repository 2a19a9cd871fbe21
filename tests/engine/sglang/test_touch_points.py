"""Every hooked SGLang name exists in the pinned version, and is documented."""

import importlib
import inspect
from pathlib import Path

import pytest

from engine.plugin import TOUCH_POINTS

DOC = Path(__file__).parents[3] / "docs" / "sglang.md"


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        yield


def _resolve(dotted):
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{dotted} does not exist")


@pytest.mark.parametrize("point", TOUCH_POINTS, ids=lambda point: point.target.rsplit(".", 2)[-1])
def test_the_hooked_name_and_the_hook_exist(point):
    assert inspect.isroutine(_resolve(point.target))
    module, name = point.hook.split(":")
    assert inspect.isfunction(getattr(importlib.import_module(module), name))


def test_the_document_lists_every_touch_point():
    text = DOC.read_text()
    missing = [point.target for point in TOUCH_POINTS if point.target.split(".srt.")[1] not in text]
    assert not missing
