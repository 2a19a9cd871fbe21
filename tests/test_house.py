"""House rules, kept by a test: who may import whom, and how large things may grow."""

import ast
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "common": set(),
    "storage": {"common"},
    "transfer": {"common", "storage"},
    "scheduler": {"common"},
    "engine": {"common", "storage", "transfer", "scheduler"},
    "launch": {"common", "storage", "transfer", "scheduler", "engine"},
}
PACKAGES = tuple(MAY_IMPORT)
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60
# Exceptions, with the size that they have. A number here may only go down.
FILE_EXCEPTIONS: dict[str, int] = {}
FUNCTION_EXCEPTIONS: dict[str, int] = {}


@cache
def tracked_files() -> list[Path]:
    """Files of the repository, also those not yet committed; never those of .gitignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    python = [path for path in tracked_files() if path.suffix == ".py"]
    return [path for path in python if not folders or name_of(path).split("/")[0] in folders]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def syntax_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Top-level names of everything that the file imports, inside functions too."""
    for node in ast.walk(syntax_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: write imports from the top"
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
    forbidden = set(PACKAGES) - MAY_IMPORT[package] - {package}
    if package in ("common", "storage", "scheduler"):
        forbidden |= {"sglang", "mooncake", "torch"}
    found = {
        f"{name_of(path)} imports {name}"
        for path in python_files(package)
        for name in imports_of(path)
        if name in forbidden
    }
    assert not found


def test_one_file_imports_mooncake():
    importers = {name_of(path) for path in python_files() if "mooncake" in imports_of(path)}
    assert importers <= {"transfer/mooncake.py"}


def test_names_of_test_files_are_unique():
    """pytest imports them by their last name alone: two alike end the whole run at collection."""
    names = [path.name for path in python_files("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


def test_files_stay_small():
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in python_files()}
    assert over(sizes, FILE_LINES_MAX, FILE_EXCEPTIONS) == {}


def test_functions_stay_small():
    sizes = {
        f"{name_of(path)}:{node.name}": (node.end_lineno or node.lineno) - node.lineno + 1
        for path in python_files()
        for node in ast.walk(syntax_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert over(sizes, FUNCTION_LINES_MAX, FUNCTION_EXCEPTIONS) == {}


def over(sizes: dict[str, int], limit: int, exceptions: dict[str, int]) -> dict[str, int]:
    """Too large, or an exception whose number no longer fits."""
    stale = {
        name: sizes.get(name, 0) for name, size in exceptions.items() if sizes.get(name) != size
    }
    large = {name: size for name, size in sizes.items() if size > limit and name not in exceptions}
    return stale | large


def test_no_path_of_a_certain_machine_is_written_down():
    home = re.compile("/(?:work|home|root|Users)" + "/[A-Za-z]")
    found = []
    for path in tracked_files():
        if path.suffix not in {".py", ".md", ".toml", ".sh", ".yaml", ".lock", ""}:
            continue
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{name_of(path)}:{n}" for n, line in enumerate(lines, 1) if home.search(line)]
    assert found == []
