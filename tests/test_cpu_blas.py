"""Products by BLAS: right for every layout, straight into what they are given, and cut by their shape alone."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends.blas import blas_threads
from minibert.kernels import cpu_blas, cpu_threads
from minibert.kernels.cpu_blas import product

needs_openblas = pytest.mark.skipif(
    blas_threads("numpy") is None, reason="NumPy's BLAS is not the OpenBLAS of its wheel"
)
SHAPES = [(3, 5, 4), (1, 7, 1), (1, 40, 400), (400, 40, 1), (530, 33, 70), (70, 33, 530), (37, 500, 801)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0), (0, 0, 0)]
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "part of wider rows": lambda x: np.hstack([x, x])[:, : x.shape[1]],
    "every other element": lambda x: np.repeat(np.repeat(x, 2, 0), 2, 1)[::2, ::2],
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
}


@pytest.fixture(params=[False, pytest.param(True, marks=needs_openblas)], ids=["usual", "deterministic"])
def mode(request: pytest.FixtureRequest) -> Iterator[bool]:
    with backends.determinism(request.param):
        yield request.param


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
def test_a_product_is_right_in_every_layout(mode: bool, shape: tuple[int, int, int], dtype: Any) -> None:
    a, b = factors(*shape, dtype)
    for left in LAYOUTS.values():
        for right in LAYOUTS.values():
            y = product(left(a), right(b))
            assert y.dtype == dtype and y.shape == (shape[0], shape[2]) and y.flags.c_contiguous
            assert_product(y, a, b)


def test_it_is_written_into_part_of_a_larger_array_and_nowhere_else(mode: bool) -> None:
    a, b = factors(530, 20, 410)
    memory = np.full((600, 500), 7, np.float32)
    out = memory[3:533, 11:421]
    assert product(a, b, out) is out
    assert_product(out, a, b)
    out[:] = 7
    assert (memory == 7).all()


def test_nothing_is_allocated_beside_the_result(mode: bool) -> None:
    a, b = factors(1024, 64, 1024)
    flat = np.empty(1024 * 1024 + 3, np.float32)
    out = flat[3:].reshape(1024, 1024)
    b = np.asfortranarray(b)
    product(a, b, out)
    tracemalloc.start()
    try:
        product(a, b, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 < out.nbytes


@pytest.mark.parametrize(
    "out", [np.empty((3, 5)), np.empty((4, 3), np.float32), np.empty((3, 4)), np.empty((4, 3), np.float32).T]
)
def test_an_out_that_does_not_fit_is_refused(mode: bool, out: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"out: expected \(3, 4\) float32 of contiguous rows, got"):
        product(*factors(3, 5, 4), out)


def test_shapes_that_do_not_fit_are_refused(mode: bool) -> None:
    a, b = factors(3, 5, 4)
    with pytest.raises(ValueError, match=r"expected \(M, K\) and \(K, N\), got \(3, 5\) and \(3, 5\)"):
        product(a, a)
    with pytest.raises(ValueError, match=r"expected \(M, K\) and \(K, N\)"):
        product(a[0], b)


@needs_openblas
@pytest.mark.parametrize("shape", [(530, 33, 70), (70, 33, 530)], ids=str)
def test_panels_keep_to_the_callers_rules_for_overflow(shape: tuple[int, int, int]) -> None:
    a, b = factors(*shape)
    a[-1, 0] = b[0, -1] = 1e30
    before = cpu_threads.num_threads()
    cpu_threads.set_num_threads(2)
    try:
        with backends.determinism(), cpu_threads.finely_split():
            with np.errstate(all="raise"), pytest.raises(FloatingPointError):
                product(a, b)
            with np.errstate(all="ignore"):
                assert np.isinf(product(a, b)[-1, -1])
    finally:
        cpu_threads.set_num_threads(before)


@needs_openblas
@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("shape", [(1024, 384, 1536), (1024, 1536, 384), (128, 384, 384), (30522, 16, 384)], ids=str)
def test_products_of_minilm_are_cut_into_as_many_panels_whatever_the_threads(
    shape: tuple[int, int, int], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = factors(*shape)
    b = LAYOUTS[layout](b)
    cuts, workers = [], set()

    def spy(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
        cuts.append((a.shape, b.shape))
        workers.add(threading.get_ident())
        time.sleep(0.005)  # time for another thread to wake
        return matmul(a, b, out=out)

    matmul = np.matmul
    before, found = cpu_threads.num_threads(), []
    with backends.determinism():
        monkeypatch.setattr(cpu_blas.np, "matmul", spy)
        try:
            for threads in (1, 2, 3):
                cuts.clear()
                cpu_threads.set_num_threads(threads)
                product(a, b)
                found.append(sorted(cuts))
        finally:
            cpu_threads.set_num_threads(before)
    assert found[0] == found[1] == found[2] and len(found[0]) in (2, 4, 8, 16)
    assert sum(rows * columns for (rows, _), (_, columns) in found[0]) == shape[0] * shape[2]
    assert len(workers) > 1, "other threads took a share"
