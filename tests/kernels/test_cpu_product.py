"""Products: right for every layout, straight into what they are given, the same bits however they are cut."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibert.kernels.cpu import product as cpu_product
from minibert.kernels.cpu import threads as cpu_threads
from minibert.kernels.cpu.product import product

SHAPES = [(3, 5, 4), (1, 7, 1), (1, 40, 400), (400, 40, 1), (530, 33, 70), (70, 33, 530), (37, 500, 801)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "part of wider rows": lambda x: np.hstack([x, x])[:, : x.shape[1]],
    "every other element": lambda x: np.repeat(np.repeat(x, 2, 0), 2, 1)[::2, ::2],
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
}


def factors(m: int, k: int, n: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(m + 10 * k + 100 * n)
    return rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)


def assert_product(y: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Within the bound of any order of summation: K roundings of the sum of absolute terms."""
    exact = a.astype(np.float64) @ b.astype(np.float64)
    bound = (a.shape[1] + 1) * np.finfo(y.dtype).eps * (abs(a).astype(np.float64) @ abs(b).astype(np.float64))
    assert (abs(y - exact) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_a_product_is_right_in_every_layout(shape: tuple[int, int, int], dtype: Any) -> None:
    a, b = factors(*shape, dtype)
    for left in LAYOUTS.values():
        for right in LAYOUTS.values():
            y = product(left(a), right(b))
            assert y.dtype == dtype and y.shape == (shape[0], shape[2]) and y.flags.c_contiguous
            assert_product(y, a, b)


def test_it_is_written_into_part_of_a_larger_array_and_nowhere_else() -> None:
    a, b = factors(530, 20, 410)
    memory = np.full((600, 500), 7, np.float32)
    out = memory[3:533, 11:421]
    assert product(a, b, out) is out
    assert_product(out, a, b)
    out[:] = 7
    assert (memory == 7).all()


def test_no_operand_is_copied_whole() -> None:
    a, b = factors(1024, 64, 1024)
    flat = np.empty(1024 * 1024 + 3, np.float32)
    out = flat[3:].reshape(1024, 1024)
    b = np.asfortranarray(b)
    before = cpu_threads.num_threads()
    cpu_threads.set_num_threads(1)
    product(a, b, out)
    tracemalloc.start()
    try:
        product(a, b, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        cpu_threads.set_num_threads(before)
    assert peak < out.nbytes / 5, "what one core packs into, and no more"


@pytest.mark.parametrize(
    "out", [np.empty((3, 5)), np.empty((4, 3), np.float32), np.empty((3, 4)), np.empty((4, 3), np.float32).T]
)
def test_an_out_that_does_not_fit_is_refused(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"out: expected \(3, 4\) float32 of contiguous rows, got"):
        product(*factors(3, 5, 4), out)


def test_shapes_that_do_not_fit_are_refused() -> None:
    a, b = factors(3, 5, 4)
    with pytest.raises(ValueError, match=r"expected \(M, K\) and \(K, N\), got \(3, 5\) and \(3, 5\)"):
        product(a, a)
    with pytest.raises(ValueError, match=r"expected \(M, K\) and \(K, N\)"):
        product(a[0], b)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neither_threads_nor_other_rows_and_columns_change_a_bit(shape: tuple[int, int, int], dtype: Any) -> None:
    a, b = factors(*shape, dtype)
    whole = product(a, b)
    row, column = shape[0] // 2, shape[2] // 3
    assert np.array_equal(product(a[row : row + 1], b), whole[row : row + 1])
    assert np.array_equal(product(a, b[:, column : column + 2]), whole[:, column : column + 2])
    before = cpu_threads.num_threads()
    try:
        with cpu_threads.finely_split():
            for threads in (1, 2, 3, 5):
                cpu_threads.set_num_threads(threads)
                assert np.array_equal(product(a, b), whole)
    finally:
        cpu_threads.set_num_threads(before)


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_it_is_added_to_what_is_there(shape: tuple[int, int, int]) -> None:
    a, b = factors(*shape)
    out = np.full((shape[0], shape[2]), 2, np.float32)
    product(a, b, out, add=True)
    np.testing.assert_allclose(out, a.astype(float) @ b.astype(float) + 2, rtol=1e-5, atol=1e-4)


@given(*(st.integers(1, size) for size in (20_000, 40_000, 3000)), st.integers(1, 64))
def test_parts_cover_the_product_once(m: int, n: int, depth: int, threads: int) -> None:
    c = np.empty(1, np.float32)
    cuts = cpu_product.cuts_of(m, n, depth, 48, threads)
    parts = [cpu_product.part_of(c, m, n, cuts, number) for number in range(cuts[0] * cuts[1])]
    assert sum(rows * columns for _, rows, _, columns in parts) == m * n
    assert all(rows > 0 and columns > 0 for _, rows, _, columns in parts)
    assert len({(i, j) for i, _, j, _ in parts}) == len(parts)


# ------------------------------------------------------------------------------------------- other instruction sets

# NUMBA_CPU_NAME, NUMBA_CPU_FEATURES, and the bytes of a vector that follow from them
INSTRUCTION_SETS = {
    "SSE2": ("generic", "", 16),
    "AVX2": ("x86-64-v3", "+avx,+avx2,+fma", 32),
    "AVX-512": ("x86-64-v4", "+avx,+avx2,+fma,+avx512f,+avx512bw,+avx512vl,+avx512dq,+avx512cd", 64),
}
NEEDED = {"SSE2": (), "AVX2": ("avx2", "fma"), "AVX-512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd")}
CHILD = """
import sys, pytest
from minibert.kernels.cpu.vectors import VECTOR_BYTES
assert VECTOR_BYTES == int(sys.argv[1]), VECTOR_BYTES
chosen = "right or transposed or copied or packed or added"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, *sys.argv[2:]]))
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="this processor has one width of vectors")
def test_products_stay_correct_with_the_instructions_of_older_processors(root: Path, tmp_path: Path) -> None:
    """The tests of this file, the microkernels, int8 and bfloat16, on vectors of three lengths, each in a process."""
    host = llvm.get_host_cpu_features()
    files = {
        name: ["test_cpu_microkernel.py", "test_cpu_product.py", "test_int8.py", "test_bfloat16.py"]
        for name in INSTRUCTION_SETS
    }
    files["AVX-512"] = ["test_int8.py", "test_bfloat16.py"]  # the others are compiled for it wherever it is there
    children = {}
    for name, (processor, features, width) in INSTRUCTION_SETS.items():
        if all(host.get(feature) for feature in NEEDED[name]):
            environment = {
                **os.environ, "PYTHONPATH": str(root), "MINIBERT_CACHE_DIR": str(tmp_path / name),
                "NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features,
            }  # fmt: skip
            children[name] = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(width), *files[name]], cwd=root / "tests/kernels", env=environment,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
    said = {name: child.communicate(timeout=600)[0] for name, child in children.items()}
    for name, child in children.items():
        assert child.returncode == 0 and " passed" in said[name], f"{name}: {said[name]}"
