"""Lets ``import torchvision`` succeed where its compiled operators do not load.

``import sglang`` imports transformers, which imports torchvision, whose operators
come as a CUDA build: beside a CPU torch they do not load, and the import dies with
"operator torchvision::nms does not exist" before any SGLang plugin has run. Set-up
therefore copies this module beside the packages, and writes a ``.pth`` file that
imports the copy at interpreter start (so that ``engine`` is not imported then). It
only leaves a finder behind, which looks at nothing but ``torchvision.extension`` and
declares the missing operators once that module has found that it has none: beside a
torchvision that works nothing changes, and without torchvision nothing is imported.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType

_MODULE = "torchvision.extension"
_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class _ExtensionLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        if module._has_ops():
            return
        import torch

        # Kept by the module: a library's declarations go with the object.
        module._declared_operators = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[attr-defined]
        for operator in _OPERATORS:
            module._declared_operators.define(operator)


class _ExtensionFinder:
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        found = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if found is None or found.origin is None:
            return found
        return spec_from_file_location(
            name, found.origin, loader=_ExtensionLoader(name, found.origin)
        )


def install() -> None:
    """Put the finder in front, once."""
    if not any(isinstance(finder, _ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ExtensionFinder())


install()
