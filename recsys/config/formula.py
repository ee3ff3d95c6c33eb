"""The value formula: arithmetic over named numbers, parsed by a fixed grammar; nothing in it is ever executed as Python."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Values = Mapping[str, Any]
Formula = Callable[[Values, Mapping[str, Callable[..., Any]]], Any]
"""(values by name, functions by name) to the result; values may be arrays; the function `number` makes a constant."""

FUNCTIONS = {"log": 1, "exp": 1, "sqrt": 1, "min": 2, "max": 2}
"""Functions a formula may call, and how many arguments each takes."""
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}
_LONGEST = 1000
"""Characters of a formula: deeper nesting than this allows could exhaust the parser's stack."""


def formula(text: str, names: Sequence[str]) -> Formula:
    """Parse `+ - * / **`, parentheses, numbers, these names and FUNCTIONS. ValueError says what else was found, and where."""
    if len(text) > _LONGEST:
        raise ValueError(f"the formula has {len(text)} characters, at most {_LONGEST} are allowed")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is not a formula: {error.args[0]}") from None
    return _compiled(tree, text, frozenset(names))


def _compiled(node: ast.expr, text: str, names: frozenset[str]) -> Formula:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        number = float(node.value)
        return lambda values, functions: functions["number"](number)
    if isinstance(node, ast.Name) and node.id in names:
        name = node.id
        return lambda values, functions: values[name]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        combine = _BINARY[type(node.op)]
        left, right = _compiled(node.left, text, names), _compiled(node.right, text, names)
        return lambda values, functions: combine(left(values, functions), right(values, functions))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        inner = _compiled(node.operand, text, names)
        return lambda values, functions: -inner(values, functions)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        called = node.func.id
        if FUNCTIONS.get(called) == len(node.args):
            parts = [_compiled(part, text, names) for part in node.args]
            return lambda values, functions: functions[called](*(part(values, functions) for part in parts))
    part = ast.get_source_segment(text.strip(), node) or text
    raise ValueError(
        f"{part!r} is not allowed in a formula: use numbers, + - * / **, {', '.join(FUNCTIONS)} and {', '.join(sorted(names))}"
    )
