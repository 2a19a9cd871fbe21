"""House rules, kept by a test: who may import whom, and how large things may grow."""

import ast
import gc
import json
import re
import subprocess
from collections import Counter
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
LIMITS = json.loads((ROOT / "tests" / "house.json").read_text())
"""``limits``: of every kind; ``exceptions``: what is above its limit, with the figure that it has.
A figure there may only go down: when it does, the test says so and it is lowered or removed."""


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
def syntax() -> dict[Path, list[ast.AST]]:
    """The nodes of every Python file, walked once for all who look at them."""
    gc.disable()  # all of it stays: half of the time would be spent on looking for garbage in it
    try:
        return {p: list(ast.walk(ast.parse(p.read_text(), str(p)))) for p in python_files()}
    finally:
        gc.enable()


def nodes_of(path: Path) -> list[ast.AST]:
    return syntax()[path]


def imports_of(path: Path) -> Iterator[str]:
    """Top-level names of everything that the file imports, inside functions too."""
    for node in nodes_of(path):
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


def test_one_file_imports_ray():
    importers = {name_of(path) for path in python_files() if "ray" in imports_of(path)}
    assert importers == {"launch/ray/places.py"}


def test_a_whole_cluster_is_marked():
    """``make test`` runs other tests at once, those that are marked ``whole`` two at a time, and
    those that are marked ``alone`` one by one."""
    starters = [
        path
        for path in python_files("tests")
        for node in nodes_of(path)
        if isinstance(node, ast.ImportFrom) and node.module == "tests.cluster"
        if "running_cluster" in [alias.name for alias in node.names]
    ]
    assert starters
    marks = ("mark.whole", "mark.alone")
    unmarked = [path for path in starters if not any(mark in path.read_text() for mark in marks)]
    assert list(map(name_of, unmarked)) == []


def test_names_of_test_files_are_unique():
    """pytest imports them by their last name alone: two alike end the whole run at collection."""
    names = [path.name for path in python_files("tests") if path.name.startswith("test_")]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("kind", LIMITS["limits"])
def test_nothing_grows_over_its_limit(kind):
    limit, exceptions = LIMITS["limits"][kind], LIMITS["exceptions"].get(kind, {})
    sizes = dict(MEASURES[kind]())
    stale = {
        name: sizes.get(name, 0) for name, size in exceptions.items() if sizes.get(name) != size
    }
    large = {name: size for name, size in sizes.items() if size > limit and name not in exceptions}
    assert stale | large == {}


def modules_a_folder() -> Iterator[tuple[str, int]]:
    folders = Counter(path.parent for path in python_files() if path.name != "__init__.py")
    yield from ((name_of(folder), count) for folder, count in folders.items())


def lines_a_file() -> Iterator[tuple[str, int]]:
    yield from ((name_of(path), len(path.read_text().splitlines())) for path in python_files())


def lines_a_function() -> Iterator[tuple[str, int]]:
    for name, node in functions():
        yield name, (node.end_lineno or node.lineno) - node.lineno + 1


def parameters_a_function() -> Iterator[tuple[str, int]]:
    """Without self and cls; a hook on SGLang (in its border) has the parameters of its target."""
    for name, node in functions():
        if not name.startswith(BORDER):
            given = node.args
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            yield name, len([a for a in names if a not in ("self", "cls")])


def methods_a_class() -> Iterator[tuple[str, int]]:
    """Of what runs in production: a test class has as many as it has cases."""
    for path in python_files(*PACKAGES, "benchmarks", "examples"):
        for node in nodes_of(path):
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, FUNCTIONS)]
                yield f"{name_of(path)}:{node.name}", len(methods)


def any_a_file() -> Iterator[tuple[str, int]]:
    """Mentions of ``typing.Any``, apart from SGLang's border, whose objects have no types."""
    for path in python_files(*PACKAGES):
        if not name_of(path).startswith(BORDER):
            uses = [n for n in nodes_of(path) if isinstance(n, ast.Name) and n.id == "Any"]
            yield name_of(path), len(uses)


def sglang_imports_a_file() -> Iterator[tuple[str, int]]:
    """Outside its border."""
    for path in python_files(*PACKAGES):
        if not name_of(path).startswith(BORDER):
            yield name_of(path), list(imports_of(path)).count("sglang")


def unexplained_excepts_a_file() -> Iterator[tuple[str, int]]:
    """``except Exception`` without a comment, there or below, that says what is known then."""
    for path in python_files(*PACKAGES, "benchmarks", "examples"):
        lines = path.read_text().splitlines()
        count = 0
        for node in nodes_of(path):
            if isinstance(node, ast.ExceptHandler) and is_broad(node):
                said = lines[node.lineno - 1 : node.lineno + 1]
                count += not any("#" in line for line in said)
        yield name_of(path), count


def is_broad(handler: ast.ExceptHandler) -> bool:
    caught = handler.type
    names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
    broad = ("Exception", "BaseException")
    return caught is None or any(isinstance(n, ast.Name) and n.id in broad for n in names)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in python_files():
        nodes = nodes_of(path)
        classes = (node for node in nodes if isinstance(node, ast.ClassDef))
        class_of = {method: f"{owner.name}." for owner in classes for method in owner.body}
        for node in nodes:
            if isinstance(node, FUNCTIONS):
                yield f"{name_of(path)}:{class_of.get(node, '')}{node.name}", node


BORDER = "engine/sglang/"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MEASURES = {
    "modules a folder": modules_a_folder,
    "lines a file": lines_a_file,
    "lines a function": lines_a_function,
    "parameters a function": parameters_a_function,
    "methods a class": methods_a_class,
    "Any a file": any_a_file,
    "SGLang imports a file": sglang_imports_a_file,
    "unexplained broad excepts a file": unexplained_excepts_a_file,
}


def test_no_path_of_a_certain_machine_is_written_down():
    home = re.compile("/(?:work|home|root|Users)" + "/[A-Za-z]")
    found = []
    for path in tracked_files():
        if path.suffix not in {".py", ".md", ".toml", ".sh", ".yaml", ".lock", ""}:
            continue
        lines = path.read_text(errors="replace").splitlines()
        found += [f"{name_of(path)}:{n}" for n, line in enumerate(lines, 1) if home.search(line)]
    assert found == []
