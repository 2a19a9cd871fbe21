"""``--model``: a name or a path becomes a folder that SGLang can load.

Models that we build are cached under the digest of everything that made them, so that a
changed recipe never meets an old folder. ``python -m launch.models NAME`` builds one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import util
from importlib.metadata import version
from pathlib import Path

from launch.cluster.config import cache_folder
from launch.settings import BadConfig, near

RECIPES = {
    "tiny": ("launch.models.tiny_model", ("tokenizers", "safetensors")),
    "default": ("launch.models.default_model", ("transformers", "gguf")),
}
"""Name -> module with ``build(folder)``, and the packages that shape its output."""

_BUILD_TIMEOUT_S = 1800.0


def resolve_model(name_or_path: str) -> Path:
    """An absolute folder with a ``config.json``, or a hub's ``org/name`` as it is.

    Builds ``tiny`` and ``default`` where they are not cached yet. Raises
    :class:`BadConfig` for what is neither a model folder nor a name.
    """
    if name_or_path in RECIPES:
        return _built(name_or_path)
    path = Path(name_or_path).expanduser()
    if path.exists():
        return _checked(path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name_or_path):
        return Path(name_or_path)
    hint = near(name_or_path, list(RECIPES))
    raise BadConfig(
        f"--model {name_or_path}: no such folder; give a folder with a config.json, a hub's "
        f"org/name, or one of {', '.join(RECIPES)}.{hint}"
    )


def model_folder(name: str) -> Path:
    """Where the built model ``name`` belongs, whether or not it is there."""
    module, packages = RECIPES[name]
    spec = util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(module)
    digest = hashlib.sha256(Path(spec.origin).read_bytes())
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


def _built(name: str) -> Path:
    folder = model_folder(name)
    if not is_model(folder):
        print(f"building model '{name}' in {folder} (once) ...", file=sys.stderr, flush=True)
        # In a process of its own: a conversion takes memory that the launcher would keep.
        command = [sys.executable, "-m", "launch.models", name]
        result = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=_BUILD_TIMEOUT_S)
        if result.returncode or not is_model(folder):
            raise BadConfig(f"--model {name}: it could not be built; the reason is above.")
    return folder


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _checked(path: Path) -> Path:
    try:
        json.loads((path / "config.json").read_text())
    except NotADirectoryError as error:
        raise BadConfig(f"--model {path}: this is a file; give the model's folder.") from error
    except OSError as error:
        raise BadConfig(
            f"--model {path}: config.json: {error.strerror}; give a folder in the format of "
            "transformers, with a readable config.json."
        ) from error
    except ValueError as error:
        raise BadConfig(f"--model {path}: config.json is not JSON: {error}.") from error
    return path.resolve()
