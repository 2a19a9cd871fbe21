"""``--model``: a name or a path becomes a folder that SGLang can load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from launch.models.recipes import RECIPES, is_model, model_folder
from launch.settings import BadConfig, near

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
