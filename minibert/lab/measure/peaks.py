"""What this machine can do, measured in this run: the ceilings of the roofline (`lab.measure.roofline`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.kernels.cpu.jit import inline, jit
from minibert.kernels.cpu.threads import num_threads, run_rows

PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (1024, 1536, 384), (1024, 30522, 384))  # (M, N, K)
ARRAY_BYTES = 1 << 27  # many times any cache
ROUNDS, LEAST_SECONDS = 7, 0.1  # of a measurement; short calls are tried more often: others' work may miss one
LAUNCHES = 200


class Peaks(NamedTuple):
    """The ceilings of the roofline."""

    gflops: float  # the best of several matrix products, by the library that does them
    product: str  # its shape
    fma_gflops: float  # multiply-adds in registers, which no product of whatever library exceeds; 0: not measured
    triad_gbps: float  # STREAM triad a = b + s c: three arrays moved
    fill_gbps: float  # one array written and none read, past the caches where the system's memset knows how
    cache_bytes: int  # the last-level cache; 0 where the system does not say

    @property
    def gbps(self) -> float:
        return max(self.triad_gbps, self.fill_gbps)

    @property
    def limit_gflops(self) -> float:
        return max(self.gflops, self.fma_gflops)


def better(first: Peaks, second: Peaks) -> Peaks:
    """The higher of each figure: other work on the machine can only lower them."""
    faster = max(first, second, key=lambda p: p.gflops)
    return faster._replace(
        **{name: max(getattr(first, name), getattr(second, name)) for name in ("fma_gflops", "triad_gbps", "fill_gbps")}
    )


def measure_peaks(dtype: str = "float32") -> Peaks:
    """Of the CPU: two seconds of work, on as many threads as are set."""
    gflops, product = max(product_gflops(dtype, *shape) for shape in PRODUCTS)
    return Peaks(gflops, product, fma_gflops(dtype), *bandwidths(dtype), last_level_cache())


def launch_seconds(backend: Backend) -> float:
    """What a call of an op costs by itself: on one element, until the result is there."""
    x = backend.asarray(np.ones(1, np.float32))
    times = []
    for _ in range(LAUNCHES):
        began = time.perf_counter()
        backend.run(OPS["add"], x, x)
        backend.synchronize()
        times.append(time.perf_counter() - began)
    return median(times)


def best_seconds(call: Callable[[], Any]) -> float:
    call()
    times: list[float] = []
    while len(times) < ROUNDS or sum(times) < LEAST_SECONDS:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def product_gflops(dtype: str, m: int, n: int, k: int) -> tuple[float, str]:
    rng = np.random.default_rng(0)
    a, b, out = rng.random((m, k)).astype(dtype), rng.random((k, n)).astype(dtype), np.empty((m, n), dtype)
    return 2 * m * n * k / best_seconds(lambda: np.matmul(a, b, out=out)) * 1e-9, f"{m} x {n} x {k}"


# --------------------------------------------------------------------------------------------------------- bandwidth


@jit
def triad(a, b, c, factor, start, stop):  # type: ignore[no-untyped-def]
    a, b, c = a[start:stop], b[start:stop], c[start:stop]
    for i in range(a.size):
        a[i] = b[i] + factor * c[i]


@jit
def fill(a, start, stop):  # type: ignore[no-untyped-def]
    a = a[start:stop]
    for i in range(a.size):
        a[i] = 0


def bandwidths(dtype: str) -> tuple[float, float]:
    """GB/s of the triad and of a fill."""
    count = ARRAY_BYTES // np.dtype(dtype).itemsize
    a, b, c = (np.full(count, value, dtype) for value in (0, 1, 2))
    factor = b.dtype.type(3)
    seconds = best_seconds(lambda: run_rows(triad, count, a, b, c, factor))

    fill_seconds = best_seconds(lambda: run_rows(fill, count, a))
    return 3 * ARRAY_BYTES / seconds * 1e-9, ARRAY_BYTES / fill_seconds * 1e-9


def last_level_cache() -> int:
    """Bytes, from Linux; 0 elsewhere."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=0)


# ---------------------------------------------------------------------------------------- multiply-adds in registers

CHAINS, LINKS = 8, 16  # two units times a latency of four; and of such a length that a core's window holds all
VALUES = 1024  # of a thread: they stay in its first-level cache
PASSES = 500  # a millisecond at the most: others' work does not fall into every such call


@inline
def four(p, x, c):  # type: ignore[no-untyped-def]
    p = p * x + c
    p = p * x + c
    p = p * x + c
    return p * x + c


@inline
def chain(p, x, c):  # type: ignore[no-untyped-def]
    return four(four(four(four(p, x, c), x, c), x, c), x, c)


@jit
def chains(values, out, factors, start, stop):  # type: ignore[no-untyped-def]
    c0, c1, c2, c3, c4, c5, c6, c7 = factors
    for row in range(start, stop):
        x, y = values[row], out[row]
        for _ in range(PASSES):
            for i in range(x.size):
                v = x[i]
                a = chain(y[i], v, c0) + chain(v, v, c1) + chain(c0, v, c2) + chain(c1, v, c3)
                b = chain(c2, v, c4) + chain(c3, v, c5) + chain(c4, v, c6) + chain(c5, v, c7)
                y[i] = a + b


def fma_gflops(dtype: str = "float32") -> float:
    """The rate on as many threads as are set, additions at the chains' ends left out.

    No matrix product can exceed it: a figure above NumPy's best product need not be wrong; one above this is.
    """
    threads, number = num_threads(), np.dtype(dtype).type
    values = np.full((threads, VALUES), 0.5, dtype)
    out = np.zeros_like(values)
    factors = tuple(number(0.1 * (i + 1)) for i in range(CHAINS))
    seconds = best_seconds(lambda: run_rows(chains, threads, values, out, factors, grain=1))
    return 2 * CHAINS * LINKS * VALUES * PASSES * threads / seconds * 1e-9
