"""The samples are checked: a formula with one term, factor, sign, constant or comparison wrong must fail the checks.

The mistakes a kernel's author makes, made by machine in the formula's own syntax tree, one at a time; the mutant then
runs as if it were a kernel. A survivor means that no sample of the op can tell the two apart.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np
import pytest

from minibert import backends
from minibert.backends.base import with_integers
from minibert.kernels import OPS
from minibert.kernels.op import Op
from minibert.lab.conform.check import run_check

NUMPY = backends.get("numpy")


class Mistake(NamedTuple):
    """One function of a formula, rewritten."""

    function: str
    text: str  # "x - mean -> x + mean"
    tree: ast.Module

    def __str__(self) -> str:
        return f"{self.function}: {self.text}"


def functions(op: Op) -> dict[str, FunctionType]:
    """The formula and the functions of its module (or imported into it from other ops) that it calls."""
    found: dict[str, FunctionType] = {}
    waiting = [op.formula]
    while waiting:
        function = waiting.pop()
        found[function.__name__] = function
        for name in function.__code__.co_names:
            other = function.__globals__.get(name)
            if isinstance(other, FunctionType) and name not in found and takes_xp_or_arrays(other):
                waiting.append(other)
    return found


def takes_xp_or_arrays(function: FunctionType) -> bool:
    """Part of the math, as opposed to Philox, which has known answers of its own, and bookkeeping of packed rows."""
    return (
        function.__module__.startswith("minibert.kernels.")
        and next(iter(inspect.signature(function).parameters)) == "xp"
    )


def rewritten(node: ast.AST) -> Iterator[ast.AST]:
    """What might wrongly stand in a node's place."""
    if isinstance(node, ast.BinOp):
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult, ast.Div)):
            yield node.left
        swaps: dict[type[ast.operator], ast.operator] = {ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Div: ast.Mult()}
        if type(node.op) in swaps:
            yield ast.BinOp(node.left, swaps[type(node.op)], node.right)
        if isinstance(node.op, ast.Pow):
            yield node.left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif isinstance(node, ast.Compare):
        opposite: dict[type[ast.cmpop], ast.cmpop] = {
            ast.Eq: ast.NotEq(),
            ast.NotEq: ast.Eq(),
            ast.Gt: ast.Lt(),
            ast.GtE: ast.Lt(),
        }
        if type(node.ops[0]) in opposite:
            yield ast.Compare(node.left, [opposite[type(node.ops[0])]], node.comparators)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value:
        yield ast.Constant(node.value * 1.001)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "mean":
        yield ast.Call(ast.Attribute(node.func.value, "sum", ast.Load()), node.args, node.keywords)


def mistakes(function: FunctionType) -> Iterator[Mistake]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    body.returns = None  # annotations are not math
    for argument in (*body.args.args, *body.args.kwonlyargs):
        argument.annotation = None
    sites = [n for statement in body.body for n in ast.walk(statement)]
    for site in sites:
        for other in rewritten(site):
            changed = copy.deepcopy(tree, {id(site): other})
            yield Mistake(
                function.__name__, f"{ast.unparse(site)} -> {ast.unparse(other)}", ast.fix_missing_locations(changed)
            )


def with_mistake(op: Op, mistake: Mistake) -> Callable[..., Any]:
    """The formula with one of its functions replaced by its mutant, as a kernel."""
    originals = functions(op)
    scope: dict[str, Any] = {}
    for function in originals.values():
        scope.update(function.__globals__)
    for name, function in originals.items():
        if name == mistake.function:
            exec(compile(mistake.tree, "<mutant>", "exec"), scope)
            scope[name].__kwdefaults__ = function.__kwdefaults__
        else:
            scope[name] = FunctionType(function.__code__, scope, name, function.__defaults__, function.__closure__)
            scope[name].__kwdefaults__ = function.__kwdefaults__
    formula = scope[op.formula.__name__]

    def kernel(*arrays: np.ndarray, **params: Any) -> Any:
        results = with_integers(op, formula(NUMPY.xp, *arrays, **params))
        for i, value in zip(op.writes, results if op.writes else (), strict=True):
            arrays[i][...] = value
        return results

    return kernel


def all_mistakes() -> Iterator[Any]:
    for op in OPS.values():
        for function in functions(op).values():
            for mistake in mistakes(function):
                yield pytest.param(op, mistake, id=f"{op.name}: {mistake}")


ALL = list(all_mistakes())


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_formula_rebuilt_without_a_mistake_passes(op: Op) -> None:
    name = op.formula.__name__
    whole = Mistake(name, "", ast.parse(textwrap.dedent(inspect.getsource(op.formula))))
    with NUMPY.using({op: with_mistake(op, whole)}):
        result = run_check("follows_formula", op, NUMPY, "float32")
    assert result.ok, result.message


@pytest.mark.parametrize(("op", "mistake"), ALL)
def test_a_mistake_in_a_formula_is_caught(op: Op, mistake: Mistake) -> None:
    with NUMPY.using({op: with_mistake(op, mistake)}):
        caught = not run_check("follows_formula", op, NUMPY, "float32").ok
    assert caught, f"no sample of {op.name} notices {mistake}"


def test_mistakes_are_made_in_all_that_computes() -> None:
    copies = {"reshape", "transpose", "concatenate", "broadcast", "where"}
    one_call = {"relu", "tanh", "matmul", "reduce_sum", "linear_grad"}
    assert {op.name for op in OPS.values()} - {param.values[0].name for param in ALL} == copies | one_call
    assert len(ALL) > 200
