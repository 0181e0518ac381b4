"""The microkernels: the right sums in the right places and nothing else touched; packed multiply-adds, with no spill.

All elements are small whole numbers, so that every sum is exact; what must not be read is NaN.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

from minibert.kernels.cpu import microkernel as cpu_microkernel
from minibert.kernels.cpu import product as cpu_product
from minibert.kernels.cpu import vectors as cpu_vectors
from minibert.kernels.cpu.jit import KERNEL_FLAGS, OPTIONS
from minibert.kernels.cpu.microkernel import MR, VECTORS
from minibert.kernels.cpu.vectors import FEATURES, VECTOR_BYTES
from tests.planted import replaced, source

DTYPES = [np.float32, np.float64]
GUARD = 77
STARTS = [(16, 0, 0), (19, 5, 7)]
DEPTHS = [1, 2, 7]


def compiled(function: Any) -> Any:
    """As `jit` compiles it, but anew: code that is loaded from disk shows no assembly."""
    return numba.njit(fastmath=KERNEL_FLAGS, **OPTIONS)(function)


def microkernel(module: ModuleType, vectors: int) -> Any:
    inner = getattr(module, f"microkernel_{vectors}")

    def call(
        a: Any, a_start: int, a_row: int, a_k: int, rows: int, b: Any, b_start: int, depth: int,
        c: Any, c_start: int, c_row: int, add: bool,
    ) -> None:  # fmt: skip
        inner(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add)

    return compiled(call)


def whole_numbers(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(shape[0] + 10 * shape[-1]).integers(-8, 9, shape).astype(dtype)


def matrix_in(memory: np.ndarray, start: int, shape: tuple[int, int], strides: tuple[int, int]) -> np.ndarray:
    """A view of a flat array."""
    item = memory.itemsize
    assert start + (shape[0] - 1) * strides[0] + (shape[1] - 1) * strides[1] < memory.size
    return np.lib.stride_tricks.as_strided(memory[start:], shape, (strides[0] * item, strides[1] * item))


def assert_microkernel(call: Any, vectors: int, dtype: Any, of: ModuleType = cpu_microkernel) -> None:
    """For every number of rows, several depths, strides and starts, written and added."""
    width = vectors * VECTOR_BYTES // np.dtype(dtype).itemsize
    for rows, depth, starts, add in itertools.product(range(1, of.MR + 1), DEPTHS, STARTS, (False, True)):
        for a_row, a_k in ((depth, 1), (depth + 4, 1), (1, rows), (1, rows + 3), (3, 3 * rows + 1)):
            a, b, c = np.full(400, np.nan, dtype), np.full(400, np.nan, dtype), np.full(500, GUARD, dtype)
            a_start, b_start, c_start = starts
            left, right = whole_numbers((rows, depth), dtype), whole_numbers((depth, width), dtype)
            matrix_in(a, a_start, (rows, depth), (a_row, a_k))[:] = left
            b[b_start : b_start + right.size] = right.reshape(-1)
            c_row = width + starts[2]
            tile = matrix_in(c, c_start, (of.MR, width), (c_row, 1))
            before = whole_numbers((of.MR, width), dtype)
            tile[:] = before if add else np.nan
            call(a, a_start, a_row, a_k, rows, b, b_start, depth, c, c_start, c_row, add)
            said = f"{rows} rows, depth {depth}, strides {a_row, a_k}, starts {starts}, add {add}"
            assert np.array_equal(tile[:rows], left @ right + (before[:rows] if add else 0)), said
            assert not np.isnan(tile).any(), f"what lies beyond the last row of A was read: {said}"
            tile[:] = GUARD
            assert (c == GUARD).all(), f"written beside C: {said}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vectors", range(1, VECTORS + 1))
def test_a_microkernel_is_right_and_touches_nothing_else(vectors: int, dtype: Any) -> None:
    assert_microkernel(microkernel(cpu_microkernel, vectors), vectors, dtype)


def square_transposer(module: ModuleType) -> Any:
    inner = module.transpose_square

    def call(x: Any, x_start: int, x_row: int, y: Any, y_start: int, y_row: int) -> None:
        inner(x, x_start, x_row, y, y_start, y_row)

    return compiled(call)


def assert_transposes(call: Any, dtype: Any) -> None:
    n = VECTOR_BYTES // np.dtype(dtype).itemsize
    for x_start, y_start, x_row, y_row in itertools.product((0, 3), (0, 5), (n, n + 3), (n, n + 1)):
        x, y = np.full(800, np.nan, dtype), np.full(800, GUARD, dtype)
        square, turned = (
            matrix_in(memory, start, (n, n), (row, 1))
            for memory, start, row in ((x, x_start, x_row), (y, y_start, y_row))
        )
        square[:] = np.arange(n * n).reshape(n, n)
        call(x, x_start, x_row, y, y_start, y_row)
        assert np.array_equal(turned, square.T)
        turned[:] = GUARD
        assert (y == GUARD).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_square_is_transposed_and_nothing_else_touched(dtype: Any) -> None:
    assert_transposes(square_transposer(cpu_vectors), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_vector_is_copied(dtype: Any) -> None:
    inner = cpu_vectors.copy_vector

    def call(x: Any, x_start: int, y: Any, y_start: int) -> None:
        inner(x, x_start, y, y_start)

    copy, lanes = compiled(call), VECTOR_BYTES // np.dtype(dtype).itemsize
    x = np.arange(100, dtype=dtype)
    for x_start, y_start in itertools.product((0, 3), (0, 5)):
        y = np.full(100, GUARD, dtype)
        expected = y.copy()
        expected[y_start : y_start + lanes] = x[x_start : x_start + lanes]
        copy(x, x_start, y, y_start)
        assert np.array_equal(y, expected)


# ---------------------------------------------------------------------------------------- the tests above can fail


def planted(old: str, new: str) -> ModuleType:
    """The module with one place of its source changed."""
    module = ModuleType("planted_microkernel")
    inner = source("cpu/microkernel.py").split("import FEATURES, INDEX, TRIPLE, Emitter, signature_of", 1)[1]
    text = replaced(source("cpu/vectors.py") + inner, old, new)
    exec(compile(text, cpu_vectors.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("last = builder.sub(rows, INDEX(1))", "last = rows"),
        ("last = builder.sub(rows, INDEX(1))", "last = builder.sub(rows, INDEX(2))"),
        ("following, depth)", "following, builder.sub(depth, INDEX(1)))"),
        ('("<", following, depth)', '("<=", following, depth)'),
        ("builder.add(a_column, a_k)", "builder.add(a_column, a_row)"),
        ("vectors * emit.lanes)", "VECTORS * emit.lanes)"),
        (
            "self.builder.load(pointer), self.vector.element",
            "self.builder.load(self.at(pointer, 1)), self.vector.element",
        ),
        ("in zip(branches, (True, False), strict=True)", "in zip(branches, (False, True), strict=True)"),
        ("emit.times(c_row, i)", "emit.times(c_row, i + 1)"),
        ("totals[i * vectors + v]", "totals[i * vectors]"),
    ],
)
def test_a_mistake_in_the_microkernel_is_noticed(old: str, new: str) -> None:
    module = planted(old, new)
    with pytest.raises(AssertionError):
        assert_microkernel(microkernel(module, 2), 2, np.float32, module)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("n + lane - size if lane & size", "n + lane if lane & size"),
        ("else lane + size", "else lane"),
        ("emit.times(y_row, i)", "emit.times(x_row, i)"),
        ("size *= 2", "size *= 4"),
    ],
)
def test_a_mistake_in_the_transpose_is_noticed(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        assert_transposes(square_transposer(planted(old, new)), np.float32)


# --------------------------------------------------------------------------------------------------- compiled code


def loops(assembly: str) -> Iterator[list[str]]:
    """The innermost loops: from a label to the jump back to it."""
    lines, labels, begins = [line.strip() for line in assembly.splitlines()], dict[str, int](), 0
    for number, line in enumerate(lines):
        if line.endswith(":"):
            labels[line[:-1]] = number
        elif line.startswith("j") and (label := labels.get(line.split()[-1], -1)) >= begins:
            yield lines[label : number + 1]
            begins = number + 1


def multiply_adds(assembly: str, dtype: Any) -> set[int]:
    """How many there are in each loop that has any; all on full vectors, and none of the sums goes through memory."""
    width, kind = {64: "z", 32: "y", 16: "x"}[VECTOR_BYTES], "s" if dtype is np.float32 else "d"
    packed, register = re.compile(rf"vfmadd\d+p{kind}\s.*%{width}mm\d+$"), r"%[xyz]mm\d+"
    frame = "%rsp|%rbp" if re.search(r"%rsp, %rbp$", assembly, re.MULTILINE) else "%rsp"  # else %rbp is like any other
    counts = set()
    for loop in loops(assembly):
        found = [line for line in loop if "fmadd" in line]
        if found:
            counts.add(len(found))
            assert [line for line in found if not packed.match(line)] == [], "not packed"
            assert [line for line in loop if re.search(rf"{register}, .*\(", line)] == [], "a vector is stored"
            assert [line for line in loop if re.search(rf"\((?:{frame})\).*{register}", line)] == [], (
                "spilt before the loop"
            )
    return counts


NEEDS_FMA = pytest.mark.skipif("+fma" not in FEATURES, reason="the processor has no fused multiply-add of these names")


@NEEDS_FMA
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_inner_loop_of_the_product_is_packed_multiply_adds_and_spills_no_sum(dtype: Any) -> None:
    function: Any = cpu_product.strip_by_panels
    strip = compiled(function.py_func)
    vector, integer = numba.from_dtype(np.dtype(dtype))[::1], numba.intp
    strip.compile((vector, *[integer] * 6, vector, *[integer] * 3, vector, vector, integer, integer, numba.boolean))
    (assembly,) = strip.inspect_asm().values()
    counts, tiles = multiply_adds(assembly, dtype), {MR * vectors for vectors in range(1, VECTORS + 1)}
    assert all(any(count % tile == 0 for count in counts) for tile in tiles), counts
    assert all(any(count % tile == 0 for tile in tiles) for count in counts), counts


@NEEDS_FMA
def test_sums_that_find_no_registers_are_noticed() -> None:
    module = ModuleType("wider")
    module.__dict__[f"microkernel_{2 * VECTORS}"] = cpu_microkernel._microkernel(2 * VECTORS)
    call = microkernel(module, 2 * VECTORS)
    vector, integer = numba.float32[::1], numba.intp
    call.compile((vector, *[integer] * 4, vector, integer, integer, vector, integer, integer, numba.boolean))
    (assembly,) = call.inspect_asm().values()
    with pytest.raises(AssertionError, match="a vector is stored"):
        multiply_adds(assembly, np.float32)
