"""Jinja's sandbox, in which every program comes to an end before it has taken much time or memory.

Jinja keeps a template from Python's insides, and bounds ranges. Here also the passes of loops and the calls of macros
are counted, and the characters of everything by which a text can grow before it is written.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # passes of loops and calls of macros
MAX_WORK = 200_000_000  # characters that texts may have had on their way, all together
MAX_NUMBER = 1e18
GROWING = (
    "batch",
    "center",
    "format",
    "indent",
    "join",
    "pprint",
    "replace",
    "slice",
    "string",
    "tojson",
    "wordwrap",
)
WIDTH = re.compile(r"\d{7}")  # in "%9999999d" or "{:9999999}"


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, **options):
        super().__init__(finalize=self.written, **options)
        self.begin()
        del self.globals["lipsum"]  # texts of any length
        self.filters = {
            name: self.bounded(name, function) for name, function in self.filters.items()
        }

    def begin(self) -> None:
        """Counts anew, for another text."""
        self.steps = self.work = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"it takes more than {MAX_STEPS} steps")

    def spend(self, characters: float, what: str) -> None:
        self.work += characters
        if self.work > MAX_WORK:
            raise jinja2.TemplateRuntimeError(
                f"it handles more than {MAX_WORK} characters, the last with {what}"
            )

    def written(self, value: Any) -> Any:
        """What {{ }} writes: a list becomes a text, too."""
        if not isinstance(value, str):
            self.spend(size(value), "what it writes")
        return value

    def concat_of(self, *parts) -> str:
        """What ~ does, which Jinja lets nobody intercept."""
        self.spend(sum(map(size, parts)), "~")
        return "".join(map(str, parts))

    def call(self, context, function, /, *args, **kwargs):
        text = getattr(function, "__self__", None)
        if isinstance(text, str):
            self._grow(function.__name__, (text, *args, *kwargs.values()))
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        are_long = [hasattr(value, "__len__") for value in (left, right)]
        if operator == "%" and isinstance(left, str):
            self._grow("format", (left, *(right if isinstance(right, tuple) else (right,))))
        elif operator == "+" and all(are_long):
            self.spend(len(left) + len(right), "+")
        elif operator == "*" and any(are_long):
            self.spend(math.prod(_factor(value) for value in (left, right)), "*")
        elif operator == "*":
            _check_number(float(abs(left)) * abs(right))
        elif operator == "**":
            _check_number(float(abs(left)) ** right)
        return super().call_binop(context, operator, left, right)

    def bounded(self, name: str, function):
        """A filter whose work is counted."""

        @functools.wraps(function)  # with the marks by which Jinja knows what else a filter wants
        def counted(*args, **kwargs):
            args = tuple(
                list(x) if name in GROWING and isinstance(x, Iterator) else x for x in args
            )
            given = (*args, *kwargs.values())
            if name in GROWING:
                self._grow(name, given)
            else:
                self.spend(sum(len(x) for x in given if isinstance(x, str)), name)
            return function(*args, **kwargs)

        return counted

    def _grow(self, name: str, given: tuple) -> None:
        """No text grows by more than the product of two things that go in: such as its length, and a width."""
        if name == "format" and any(isinstance(x, str) and WIDTH.search(x) for x in given[:1]):
            raise jinja2.TemplateRuntimeError("a format has too large a width")
        *_, second, first = sorted(
            [1, 1, *(abs(x) if isinstance(x, int | float) else size(x) for x in given)]
        )
        self.spend(first * second, name)

    def _parse(self, source, name, filename):
        """Every pass of a loop and every call of a macro begins with a step."""
        tree = super()._parse(source, name, filename)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            block.body.insert(0, nodes.ExprStmt(_own("step", [])).set_lineno(block.lineno))
        return _Concatenations().visit(tree)


class _Concatenations(NodeTransformer):
    def visit_Concat(self, node):
        return _own("concat_of", self.generic_visit(node).nodes)


def _check_number(number: float) -> None:
    if number > MAX_NUMBER:
        raise jinja2.TemplateRuntimeError(f"it computes a number of more than {MAX_NUMBER:.0e}")


def _factor(value: Any) -> float:
    return float(len(value) if hasattr(value, "__len__") else abs(value))


def _own(name: str, arguments: list) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), arguments, [], None, None)


def size(value: Any, known: dict[int, int] | None = None) -> int:
    """Characters of a value as a text, about; what is in a list many times is looked at once."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return 1
    known = {} if known is None else known
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(size(part, known) for part in parts)
    return known[id(value)]
