"""An environment of many turns for ``python -m launch.rollout``: a calculator.

    python -m launch.rollout --input examples/calculator.jsonl --output /tmp/calculator \\
        --env examples.calculator:Calculator --n 4 --max-turns 6 --logprobs

The model may write ``CALC(12 * 7)`` and is told the value; ``ANSWER: 84`` ends the episode,
with reward 1 if it equals the row's column ``answer`` and 0 if not.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

from launch.rollout.env import Done, Reply, Say

_CALL = re.compile(r"CALC\((.*?)\)\s*$", re.MULTILINE)
_ANSWER = re.compile(r"ANSWER:\s*(-?\d+(?:\.\d+)?)")
_OPERATORS: dict[type[ast.AST], Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


class Calculator:
    """One episode. ``row`` needs the number ``answer``."""

    def __init__(self, row: dict[str, Any]) -> None:
        self._answer = float(row["answer"])

    async def reply(self, reply: Reply) -> Say | Done:
        """Compute what the model asks for, or judge its answer."""
        if found := _ANSWER.search(reply.text):
            return Done(reward=float(float(found[1]) == self._answer))
        call = _CALL.search(reply.text)
        if call is None:
            return Say(text="Write CALC(expression) to compute, or ANSWER: number to end.")
        try:
            return Say(text=f"{call[1]} = {evaluate(call[1]):g}")
        except (ValueError, SyntaxError, ZeroDivisionError) as error:
            return Say(text=f"{call[1]}: {error}")


def evaluate(expression: str) -> float:
    """The value of sums, differences, products and quotients of numbers."""
    return _value(ast.parse(expression.strip(), mode="eval").body)


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError("only numbers, + - * / and brackets")
