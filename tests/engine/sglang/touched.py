"""What a file of the border touches of SGLang's objects, as far as its syntax shows."""

import ast
from collections.abc import Iterator

Functions = ast.FunctionDef | ast.AsyncFunctionDef


def attributes_touched(source: ast.Module) -> set[str]:
    """Attributes of whatever comes from an argument without a type of its own (``Any``): of
    itself, of what hangs on it, of what is kept of it in ``self`` or in a variable."""
    functions = [node for node in ast.walk(source) if isinstance(node, Functions)]
    kept = {name for function in functions for name in _kept_in_self(function)}
    return {name for function in functions for name in _touched_in(function, kept)}


def _untyped(function: Functions) -> set[str]:
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return {
        argument.arg
        for argument in arguments
        if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
    } - {"original", "result"}


def _kept_in_self(function: Functions) -> Iterator[str]:
    untyped = _untyped(function)
    for target, value in _assignments(function):
        if isinstance(target, ast.Attribute) and isinstance(value, ast.Name):
            if value.id in untyped:
                yield target.attr


def _touched_in(function: Functions, kept: set[str]) -> Iterator[str]:
    names, before = _untyped(function), -1
    while len(names) > before:  # variables may be given to variables
        before = len(names)
        names |= {
            target.id
            for target, value in _assignments(function)
            if isinstance(target, ast.Name) and _comes_from(value, names, kept)
        }
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and _comes_from(node.value, names, kept):
            yield node.attr


def _assignments(function: Functions) -> Iterator[tuple[ast.expr, ast.expr]]:
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            yield node.target, node.iter
        elif isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                yield from zip(target.elts, value.elts, strict=True)
            else:
                yield target, value


def _comes_from(value: ast.expr, names: set[str], kept: set[str]) -> bool:
    while isinstance(value, ast.Attribute | ast.Call | ast.Subscript):
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            if value.value.id == "self":
                return value.attr in kept
        value = value.func if isinstance(value, ast.Call) else value.value
    return isinstance(value, ast.Name) and value.id in names
