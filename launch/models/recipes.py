"""The models that are built here, and where.

They are cached under the digest of everything that made them, so that a changed recipe never
meets an old folder. ``python -m launch.models NAME`` builds one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from importlib import util
from importlib.metadata import version
from pathlib import Path

from common.user_files import cache_folder

_TINY = "launch.models.tiny_model"
_RANDOM = ("launch.models.random_model", _TINY)
_OF_RANDOM = ("tokenizers", "safetensors", "transformers")
RECIPES = {
    "tiny": ((_TINY,), ("tokenizers", "safetensors")),
    "tiny-mla": (("launch.models.tiny_mla", _TINY), _OF_RANDOM),
    "tiny-dsa": (("launch.models.tiny_dsa", _TINY), ("tokenizers", "safetensors")),
    "tiny-swa": (("launch.models.tiny_swa", *_RANDOM), _OF_RANDOM),
    "tiny-mtp": (
        ("launch.models.tiny_mtp", "launch.models.tiny_dsa", _TINY),
        ("tokenizers", "safetensors"),
    ),
    "tiny-v4": (("launch.models.tiny_v4", _TINY), ("tokenizers", "safetensors")),
    "tiny-gemma3": (("launch.models.tiny_gemma3", *_RANDOM), _OF_RANDOM),
    "tiny-hybrid": (("launch.models.tiny_hybrid", *_RANDOM), _OF_RANDOM),
    "tiny-gdn": (("launch.models.tiny_gdn", *_RANDOM), _OF_RANDOM),
    "default": (("launch.models.default_model",), ("transformers", "gguf")),
}
"""Name -> module with ``build(folder)``, others that it uses, and the packages that shape its
output."""


def model_folder(name: str) -> Path:
    """Where the built model ``name`` belongs, whether or not it is there."""
    modules, packages = RECIPES[name]
    digest = hashlib.sha256()
    for module in modules:
        spec = util.find_spec(module)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(module)
        digest.update(Path(spec.origin).read_bytes())
    for package in packages:
        digest.update(f"{package}=={version(package)}\n".encode())
    return cache_folder() / "models" / f"{name}-{digest.hexdigest()[:16]}"


def build_into(folder: Path, build: Callable[[Path], None]) -> None:
    """Run ``build`` on a scratch folder and rename it: ``folder`` is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)
        os.rename(scratch, folder)
    except OSError:
        if not is_model(folder):  # else another process was faster: its files are the same
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()
