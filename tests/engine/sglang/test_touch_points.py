"""The border to SGLang: all that it touches exists in the pinned version, and is documented."""

import ast
import inspect
import re

import pytest
import torch
import zmq

from engine.sglang import tables
from engine.sglang.border import ROOT, VIEWS, function_of
from tests.engine.sglang.installed import Missing, accepts, find, function
from tests.engine.sglang.touched import attributes_touched

HOOKS = [hook for table in tables.HOOKS.values() for hook in table]
FOREIGN = (dict, list, set, str, torch.Tensor, zmq.Socket)


@pytest.fixture(scope="module", autouse=True)
def _cpu_platform():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_PLATFORM", "dualpath_cpu")
        yield


def _short(module):
    return module.__name__.removeprefix("engine.sglang.")


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.rsplit(".", 2)[-1])
def test_the_hooked_name_and_the_hook_exist(hook):
    assert inspect.isroutine(find(hook.target))
    assert inspect.isfunction(function_of(hook.hook))


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.target.rsplit(".", 2)[-1])
def test_a_hook_takes_what_the_hooked_function_takes(hook):
    """By position, and by name as well, since a caller may name any argument."""
    ours = _parameters(function_of(hook.hook))
    if hook.kind in ("after", "around"):
        del ours[0]  # the result, or the original
    any_position = any(p.kind is p.VAR_POSITIONAL for p in ours)
    any_name = any(p.kind is p.VAR_KEYWORD for p in ours)
    by_position = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    names = {p.name for p in ours}
    for place, theirs in enumerate(_parameters(function(hook.target))):
        if theirs.kind in (theirs.POSITIONAL_ONLY, theirs.POSITIONAL_OR_KEYWORD):
            assert any_position or place < len(by_position), f"no place for {theirs.name}"
        if theirs.kind in (theirs.KEYWORD_ONLY, theirs.POSITIONAL_OR_KEYWORD) and place > 0:
            assert any_name or theirs.name in names, f"{theirs.name} cannot be given by name"


def _parameters(of):
    return list(inspect.signature(of).parameters.values())


def _uses():
    return [
        pytest.param(use, id=f"{_short(module)}-{use.name.rsplit('.', 2)[-1]}")
        for module in tables.modules()
        for use in tables.uses_of(module)
    ]


@pytest.mark.parametrize("use", _uses())
def test_what_is_used_exists(use):
    find(use.name)
    if use.keywords:
        assert accepts(use.name, use.keywords) == []


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_what_is_seen_of_an_object_exists(view):
    for name in VIEWS[view]:
        for member in tables.members(view):
            find(f"{name}.{member}")
            if inspect.isfunction(ours := getattr(view, member, None)):
                arguments = [p.name for p in _parameters(ours)[1:]]
                assert accepts(f"{name}.{member}", arguments) == []


def test_what_is_imported_stands_in_a_table():
    lacking = {
        _short(module): unlisted
        for module in tables.modules()
        if (unlisted := _imported(module) - _listed(module))
    }
    assert lacking == {}


def test_what_is_touched_of_an_object_stands_in_a_table():
    """Also attributes, except those of Python's, torch's and zmq's own types, and ours."""
    modules = tables.modules()
    seen = {member for view in VIEWS for member in tables.members(view)}
    foreign = {name for kind in FOREIGN for name in dir(kind)}
    unlisted = {
        _short(module): names
        for module in modules
        if (names := attributes_touched(_syntax(module)) - _last_names(module) - seen - foreign)
    }
    assert unlisted == {"decode.restore_hooks": {"dualpath_restore"}}


def test_what_stands_in_a_table_is_touched():
    stale = [
        f"{_short(module)}: {name}"
        for module in tables.modules()
        for name in _last_names(module)
        if not re.search(rf"\b{name}\b", _code_beside_the_table(module))
    ]
    assert stale == []


def _code_beside_the_table(module):
    lines = inspect.getsource(module).splitlines()
    for node in _syntax(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "USES":
            del lines[node.lineno - 1 : node.end_lineno]
            break
    return "\n".join(lines)


def _last_names(module):
    return {use.name.rsplit(".", 1)[-1] for use in tables.uses_of(module)}


def _syntax(module):
    return ast.parse(inspect.getsource(module))


def _imported(module):
    """Names that a file takes from SGLang, relative to ``sglang.srt`` where they are there."""
    found = set()
    for node in ast.walk(_syntax(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "sglang"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sglang":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix(ROOT) for name in found}


def _listed(module):
    """Every name that a file lists, and what each is in."""
    names = set()
    for use in tables.uses_of(module):
        parts = use.name.split(".")
        names |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    return names


@pytest.mark.parametrize(
    "name",
    ["managers.schedule_batch.Req.riddle", "managers.schedule_batch.Request", "manager.Req"],
)
def test_what_is_missing_is_seen(name):
    with pytest.raises(Missing):
        find(name)


def test_the_document_is_current():
    page = tables.PAGE.read_text()
    assert page == tables.page_with(tables.markdown()), "python -m engine.sglang.tables"
