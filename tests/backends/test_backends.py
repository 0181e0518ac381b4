"""Backends: who runs here and why not, the one door, kernels swapped in, watchers, memory, threads."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend, BackendUnavailable, blas
from minibert.backends.blas import blas_threads
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.elementwise import add, mul, scale
from minibert.kernels.op import Array, Op
from minibert.kernels.softmax import softmax

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def backend() -> Backend:
    return Backend("bare", numpy_module)


def entry(name: str, target: str) -> EntryPoint:
    return EntryPoint(name=name, value=target, group=backends.GROUP)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Declare entry points of other packages; backends loaded in the test are forgotten after it."""

    def declare(*points: EntryPoint) -> None:
        monkeypatch.setattr(backends, "_third_party", lambda: {p.name: p for p in points})

    monkeypatch.setattr(backends, "_loaded", {})
    return declare


# Which run here.


def test_the_reference_comes_first_and_a_backend_is_made_once() -> None:
    assert backends.names()[:2] == ["numpy", "numba"]
    assert backends.get("numpy") is backends.get("numpy")
    assert backends.get("numpy").name == "numpy"


def test_an_unknown_name_is_told_with_those_that_are_known() -> None:
    with pytest.raises(UserError, match="no backend is called 'nunpy': choose one of numpy, numba"):
        backends.get("nunpy")


def test_a_backend_of_another_package_is_found_by_its_entry_point(
    others: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ModuleType("toy_package")
    package.plugged_in = Backend("toy", numpy_module)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_package", package)
    others(entry("toy", "toy_package:plugged_in"), entry("numpy", "toy_package:plugged_in"))  # ours stays itself
    assert backends.names() == ["numpy", "numba", "cupy", "emulator", "toy"]
    assert backends.get("toy").name == "toy"
    assert backends.get("numpy").name == "numpy"


def test_a_backend_that_cannot_run_says_why_and_what_mends_it(others: Callable[..., None]) -> None:
    others(entry("ghost", "library_nobody_has:backend"), entry("number", "math:pi"))
    with pytest.raises(BackendUnavailable, match=r"'ghost' cannot run here: .*library_nobody_has.*to mend it"):
        backends.get("ghost")
    with pytest.raises(BackendUnavailable, match="'number': its entry point gave float, expected a minibert Backend"):
        backends.get("number")
    statuses = {s.name: s for s in backends.available()}
    assert statuses["numpy"].backend is not None and statuses["numpy"].reason == ""
    assert statuses["ghost"].backend is None and "library_nobody_has" in statuses["ghost"].reason


def test_numba_missing_gives_its_remedy(others: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    others()
    monkeypatch.setitem(backends.BUILT_IN, "numba", "library_nobody_has.numba_backend")
    with pytest.raises(BackendUnavailable, match="to mend it: pip install numba scipy"):
        backends.get("numba")


# The door.


def test_a_formula_runs_where_there_is_no_kernel(backend: Backend) -> None:
    np.testing.assert_array_equal(backend.run(add, X, X), 2 * X)
    assert backend.kernel(add) is None and backend.by(add) == "formula"
    assert backend.run(OPS["square_norm"], X).shape == ()  # an array, not a NumPy scalar
    assert isinstance(backend.run(OPS["square_norm"], X), np.ndarray)


def test_kernels_are_found_by_the_name_of_their_op() -> None:
    numba = backends.get("numba")
    from minibert.kernels.softmax import cpu

    assert numba.kernel(softmax) is cpu.softmax and numba.by(softmax) == "kernel"
    assert numba.kernel(OPS["reshape"]) is None


def test_an_op_that_writes_does_so_in_place_by_formula_too(backend: Backend) -> None:
    adamw = OPS["adamw"]
    p, g, m, v = np.ones((4, 5), np.float32)
    before = p.copy()
    results = backend.run(adamw, p, g, m, v, np.float32(1), lr=0.1, step=1)
    assert len(results) == 3 and all(a is b for a, b in zip(results, (p, m, v), strict=True))
    assert np.all(p != before) and np.all(g == 1)


def halved(a: Array, b: Array) -> Array:
    return (a + b) / 2


def summed_by_library(a: Array, b: Array) -> Array:
    return np.add(a, b)


summed_by_library.by = "library"  # type: ignore[attr-defined]


def test_using_swaps_kernels_in_nests_and_restores(backend: Backend) -> None:
    with backend.using({add: halved}) as same:
        assert same is backend and backend.by(add) == "kernel"
        np.testing.assert_array_equal(backend.run(add, X, X), X)
        with backend.using({add: None, mul: halved}):
            np.testing.assert_array_equal(backend.run(add, X, X), 2 * X)
            np.testing.assert_array_equal(backend.run(mul, X, X), X)
        np.testing.assert_array_equal(backend.run(add, X, X), X)
        np.testing.assert_array_equal(backend.run(mul, X, X), X * X)
        with backend.using({add: summed_by_library}):
            assert backend.by(add) == "library"
    np.testing.assert_array_equal(backend.run(add, X, X), 2 * X)


def test_using_restores_after_an_error(backend: Backend) -> None:
    with pytest.raises(ZeroDivisionError), backend.using({add: halved}):
        raise ZeroDivisionError
    assert backend.by(add) == "formula"


def test_using_none_runs_the_formula_in_place_of_a_kernel() -> None:
    numba = backends.get("numba")
    with numba.using({softmax: None}):
        assert numba.by(softmax) == "formula"
    assert numba.by(softmax) == "kernel"


class Recorder:
    """A watcher that notes each op by name, before and after, with the label it was given."""

    def __init__(self, label: str, log: list[str]) -> None:
        self.label, self.log = label, log

    def __call__(self, op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        self.log.append(f"{self.label}>{op.name}{dict(params)}")
        result = call()
        self.log.append(f"<{self.label}")
        return result


def test_watchers_see_every_call_nest_and_leave(backend: Backend) -> None:
    log: list[str] = []
    with backend.watched_by(Recorder("a", log)):
        backend.run(add, X, X)
        with backend.watched_by(Recorder("b", log)):
            backend.run(scale, X, factor=2.0)
        backend.run(mul, X, X)
    backend.run(add, X, X)
    inner = ["b>scale{'factor': 2.0}", "a>scale{'factor': 2.0}", "<a", "<b"]
    assert log == ["a>add{}", "<a", *inner, "a>mul{}", "<a"]


def test_watchers_leave_after_an_error(backend: Backend) -> None:
    log: list[str] = []
    with pytest.raises(ValueError), backend.watched_by(Recorder("a", log)):
        backend.run(add, X, np.ones(7))
    backend.run(add, X, X)
    assert log == ["a>add{}"]


def test_a_watcher_may_change_what_is_returned_or_call_twice(backend: Backend) -> None:
    def twice(op: Op, arrays: Any, params: Any, call: Callable[[], Any]) -> Any:
        return call() + call()

    with backend.watched_by(twice):
        np.testing.assert_array_equal(backend.run(add, X, X), 4 * X)


def test_a_watcher_may_run_ops_elsewhere_without_being_watched(backend: Backend) -> None:
    reference, log = backends.get("numpy"), []

    def compare(op: Op, arrays: Any, params: Any, call: Callable[[], Any]) -> Any:
        log.append(np.array_equal(reference.run(op, *arrays, **params), call()))
        return call()

    with backend.watched_by(compare):
        backend.run(add, X, X)
    assert log == [True]


# Memory and threads.

MEGABYTE = 1 << 20


def test_peak_memory_is_what_was_allocated(backend: Backend) -> None:
    with backend.peak_memory() as peak:
        a = np.ones(3 * MEGABYTE, np.uint8)
        del a
        b = np.ones(MEGABYTE, np.uint8)
    assert 3 * MEGABYTE <= peak() < 3.1 * MEGABYTE
    with backend.peak_memory() as peak:
        pass
    assert peak() < 0.1 * MEGABYTE
    assert b.nbytes == MEGABYTE


def test_peak_memory_counts_temporaries_of_an_op() -> None:
    x = np.ones((256, 1024), np.float32)  # 1 MB
    for name in ("numpy", "numba"):
        place = backends.get(name)
        place.run(softmax, x)  # compile first
        with place.peak_memory() as peak:
            place.run(softmax, x)
        assert MEGABYTE <= peak() < 5 * MEGABYTE, name


def test_threads_can_be_set_for_all_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = blas_threads() or 1
    monkeypatch.setenv(backends.THREADS, "1")
    try:
        backends.get("numba")
        backends.set_num_threads(1)
        assert blas_threads() in (1, None)
        assert "(1 threads," in backends.get("numba").describe()
        backends.set_num_threads(2)
        assert "(2 threads," in backends.get("numba").describe()
    finally:
        backends.set_num_threads(before)


def test_the_description_says_whose_kernels_blas_took(root: Path) -> None:
    code = "import minibert; print(minibert.backends.get('numpy').describe())"
    described = {}
    for core in ("Haswell", "Sandybridge"):
        environment = {**os.environ, "PYTHONPATH": str(root), "OPENBLAS_CORETYPE": core}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600
        )
        described[core] = done.stdout
        assert re.search(r"BLAS kernels \w+, BLAS threads \w+", done.stdout), done.stderr
    if platform.machine() == "x86_64" and blas.blas_kernels() != "unknown":
        assert all(core in text for core, text in described.items()), "OpenBLAS was asked for each"


@pytest.mark.parametrize("count", [0, -1, 1.5, "two", ""])
def test_a_number_of_threads_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(UserError, match="threads: expected a number of threads from 1 to 1024, got"):
        backends.set_num_threads(count)


@pytest.mark.parametrize(("value", "printed"), [("3", "3 3"), (" 3 ", "3 3"), ("two", None), ("0", None), ("²", None)])
def test_threads_from_the_environment(value: str, printed: str | None, root: Path) -> None:
    code = (
        "from minibert import backends, errors\n"
        "from minibert.kernels.cpu import threads as cpu_threads\n"
        "try: backends.get('numba'); backends.get('numpy')\n"
        "except errors.UserError as error: print('refused:', error)\n"
        "else:\n"
        "    from minibert.backends.blas import blas_threads\n"
        "    print(cpu_threads.num_threads(), blas_threads() or 3)\n"
    )
    environment = {**os.environ, backends.THREADS: value, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    refusal = f"refused: $MINIBERT_NUM_THREADS: expected a number of threads from 1 to 1024, got {value!r}"
    assert done.stdout.strip() == (printed or refusal)
