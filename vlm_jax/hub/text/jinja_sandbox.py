"""A Jinja sandbox with bounded time and memory.

Jinja's own sandbox hides Python's internals and bounds ranges. This one also counts loop iterations
and macro calls, and the characters of every operation that can make a text grow.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # loop iterations and macro calls
MAX_WORK = 200_000_000  # characters of all intermediate texts together
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
        del self.globals["lipsum"]  # produces text of any length
        self.filters = {
            name: self.bounded(name, function) for name, function in self.filters.items()
        }

    def begin(self) -> None:
        """Resets the counters before a text is rendered."""
        self.steps = self.work = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise jinja2.TemplateRuntimeError(f"it takes more than {MAX_STEPS} steps")

    def spend(self, characters: float, operation: str) -> None:
        self.work += characters
        if self.work > MAX_WORK:
            raise jinja2.TemplateRuntimeError(
                f"it handles more than {MAX_WORK} characters, the last with {operation}"
            )

    def written(self, value: Any) -> Any:
        """Counts a value that {{ }} converts to text, such as a list."""
        if not isinstance(value, str):
            self.spend(size(value), "what it writes")
        return value

    def concatenate(self, *parts) -> str:
        """The operator ~, which Jinja does not let an environment intercept."""
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
            values = right if isinstance(right, tuple) else (right,)
            self._grow("format", (left, *values))
        elif operator == "+" and all(are_long):
            self.spend(len(left) + len(right), "+")
        elif operator == "*" and any(are_long):
            self.spend(_factor(left) * _factor(right), "*")
        elif operator == "*":
            _check_number(float(abs(left)) * abs(right))
        elif operator == "**":
            _check_number(float(abs(left)) ** right)
        return super().call_binop(context, operator, left, right)

    def bounded(self, name: str, function):
        """Wraps a filter so that its work is counted."""

        # wraps() also copies the attributes that tell Jinja which further arguments a filter takes.
        @functools.wraps(function)
        def counted(*args, **kwargs):
            if name not in GROWING:
                texts = [x for x in (*args, *kwargs.values()) if isinstance(x, str)]
                self.spend(sum(map(len, texts)), name)
                return function(*args, **kwargs)
            # An iterator can be consumed only once: a list can be measured and then passed on.
            args = tuple(list(x) if isinstance(x, Iterator) else x for x in args)
            self._grow(name, (*args, *kwargs.values()))
            return function(*args, **kwargs)

        return counted

    def _grow(self, name: str, values: tuple) -> None:
        """Spends the product of the two largest inputs, such as a text's length and a width.

        No operation of `GROWING` returns more than that.
        """
        if name == "format" and any(isinstance(x, str) and WIDTH.search(x) for x in values[:1]):
            raise jinja2.TemplateRuntimeError("a format has too large a width")
        sizes = [abs(x) if isinstance(x, int | float) else size(x) for x in values]
        *_, second, first = sorted([1, 1, *sizes])
        self.spend(first * second, name)

    def _parse(self, source, name, filename):
        """Inserts a step at the start of every loop body, macro and block."""
        tree = super()._parse(source, name, filename)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            step = nodes.ExprStmt(_call_environment("step", []))
            block.body.insert(0, step.set_lineno(block.lineno))
        return _Concatenations().visit(tree)


class _Concatenations(NodeTransformer):
    def visit_Concat(self, node):
        return _call_environment("concatenate", self.generic_visit(node).nodes)


def _check_number(number: float) -> None:
    if number > MAX_NUMBER:
        raise jinja2.TemplateRuntimeError(f"it computes a number of more than {MAX_NUMBER:.0e}")


def _factor(value: Any) -> float:
    return float(len(value) if hasattr(value, "__len__") else abs(value))


def _call_environment(method: str, arguments: list) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)


def size(value: Any, known: dict[int, int] | None = None) -> int:
    """Approximate number of characters of a value as text.

    Every object is visited once (`known`: id -> size), however often nested lists contain it.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, Mapping | list | tuple | set | frozenset):
        return 1
    known = {} if known is None else known
    if id(value) not in known:
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(size(part, known) for part in parts)
    return known[id(value)]
