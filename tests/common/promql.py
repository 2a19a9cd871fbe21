"""Reads PromQL as far as a dashboard's test needs: which metrics, which labels, in what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r'\s*(?P<token>"(?:[^"\\]|\\.)*"|\[[^\]]*\]|[a-zA-Z_:][a-zA-Z0-9_:]*|[0-9.]+[a-z]*'
    r"|=~|!~|!=|==|<=|>=|[-+*/%^<>=(){},])"
)
AGGREGATIONS = {"sum", "max", "min", "avg", "count", "topk", "quantile"}
RATES = {"rate", "increase", "irate"}
FUNCTIONS = AGGREGATIONS | RATES | {"histogram_quantile", "clamp_max"}
_OPERATORS = {"and", "or", "unless", "on", "ignoring", "group_left", "group_right", "offset"}


class BadPromQl(Exception):
    """Something that is not read here."""


@dataclass
class Call:
    """A function, or an aggregation with the labels that it keeps."""

    function: str
    by: set[str] = field(default_factory=set)


@dataclass
class Selector:
    """A metric, the labels that are asked of it, and the calls around it, the innermost last."""

    metric: str
    labels: set[str]
    has_range: bool
    calls: list[Call]

    @property
    def keeps(self) -> set[str] | None:
        """Labels that the innermost aggregation leaves; None: all."""
        kept = [call.by for call in self.calls if call.function in AGGREGATIONS]
        return kept[0] if kept else None


def selectors_of(expression: str) -> list[Selector]:
    """Raises :class:`BadPromQl`."""
    return list(_Reader(expression).read())


class _Reader:
    def __init__(self, expression: str) -> None:
        self._expression = expression
        self._tokens: list[str] = []
        at = 0
        while at < len(expression.rstrip()):
            match = _TOKEN.match(expression, at)
            if match is None:
                raise BadPromQl(f"{expression!r} at {at}")
            self._tokens.append(match["token"])
            at = match.end()
        self._at = 0

    def read(self) -> Iterator[Selector]:
        calls: list[Call | None] = []
        while self._at < len(self._tokens):
            token = self._next()
            if token == "(":
                calls.append(None)
            elif token == ")":
                if not calls:
                    raise BadPromQl(f"{self._expression!r}: a bracket too many")
                calls.pop()
            elif re.match("[a-zA-Z_:]", token):
                if token in FUNCTIONS:
                    calls.append(Call(token, self._by()))
                    self._expect("(")
                elif token not in _OPERATORS:
                    labels = self._matchers()
                    around = [call for call in calls if call is not None]
                    yield Selector(token, labels, self._range(), around)
        if calls:
            raise BadPromQl(f"{self._expression!r}: an open bracket")

    def _by(self) -> set[str]:
        if self._peek() != "by":
            return set()
        self._next()
        self._expect("(")
        labels = set()
        while (token := self._next()) != ")":
            if token != ",":
                labels.add(token)
        return labels

    def _matchers(self) -> set[str]:
        labels: set[str] = set()
        if self._peek() != "{":
            return labels
        self._next()
        while self._peek() != "}":
            labels.add(self._next())
            if self._next() not in ("=", "!=", "=~", "!~") or not self._next().startswith('"'):
                raise BadPromQl(f"{self._expression!r}: a matcher")
            if self._peek() == ",":
                self._next()
        self._next()
        return labels

    def _range(self) -> bool:
        has_range = self._peek().startswith("[")
        if has_range:
            self._next()
        return has_range

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _next(self) -> str:
        token = self._peek()
        if not token:
            raise BadPromQl(f"{self._expression!r} ends too early")
        self._at += 1
        return token

    def _expect(self, wanted: str) -> None:
        if (token := self._next()) != wanted:
            raise BadPromQl(f"{self._expression!r}: {token!r} where {wanted!r} should be")
