"""Every loop on floats of the CPU's kernels is compiled to arithmetic on vectors; read from LLVM's code."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numba
import numpy as np

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.cpu.jit import KERNEL_FLAGS, OPTIONS
from minibert.kernels.cpu.vectors import VECTOR_BYTES

ARITHMETIC = re.compile(r"= (?:[a-z]+ )*(?:fadd|fsub|fmul|fdiv|fcmp|select|call)\b[^\n]*<(\d+) x (float|double)>")
NO_ARITHMETIC = {"attention.store": "copies"}
LEAST = min(32, VECTOR_BYTES)  # bytes: LLVM may choose half of the widest vectors


def widest_vector(function: Any, kinds: tuple[Any, ...]) -> int:
    """Bytes of the widest vector of floats that the compiled function computes with; 0 if it goes one by one."""
    anew = numba.njit(fastmath=KERNEL_FLAGS, **OPTIONS)(function)  # code that is loaded from disk shows nothing
    anew.compile(kinds)
    (text,) = anew.inspect_llvm().values()
    return max((int(lanes) * {"float": 4, "double": 8}[kind] for lanes, kind in ARITHMETIC.findall(text)), default=0)


def kernels_that_ran() -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Name, function and argument types of all that the samples of all ops call in float32."""
    backend, rng, modules = backends.get("numba"), np.random.default_rng(0), set()
    for op in OPS.values():
        kernel = backend.kernel(op)
        if kernel is None:
            continue
        family = kernel.__module__.rpartition(".")[0]
        modules |= {name for name in sys.modules if name.rpartition(".")[0] == family}
        for arrays, params in op.samples(rng):
            given = [x.astype(np.float32) if x.dtype.kind == "f" else x for x in map(np.asarray, arrays)]
            backend.run(op, *given, **params)
    for name in sorted(modules):
        for attribute, value in sorted(vars(import_module(name)).items()):
            if getattr(getattr(value, "py_func", None), "__module__", None) != name:
                continue
            kinds = [k for k in value.overloads if any(getattr(one, "dtype", None) == numba.float32 for one in k)]
            if kinds:
                yield f"{name.split('.')[-2]}.{attribute}", value.py_func, kinds[0]


def test_every_kernel_computes_on_vectors() -> None:
    found = {name: widest_vector(function, kinds) for name, function, kinds in kernels_that_ran()}
    assert len(found) > 30 and found.keys() >= NO_ARITHMETIC.keys()
    assert {name: size for name, size in found.items() if size < LEAST and name not in NO_ARITHMETIC} == {}


def test_a_loop_that_goes_one_by_one_is_noticed() -> None:
    def erf_rows(x: Any, y: Any, start: int, stop: int) -> None:
        for i in range(start, stop):
            y[i] = math.erf(x[i])  # a call of the C library for each

    vector = numba.float32[::1]
    assert widest_vector(erf_rows, (vector, vector, numba.intp, numba.intp)) < LEAST
