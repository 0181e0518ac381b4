"""What this machine can do, measured in this run: the fastest matrix product, the fastest stream through memory."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.cpu_threads import jit, num_threads, run_rows

PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 1536, 384), (1024, 30522, 384))  # (M, N, K)
ARRAY_BYTES = 1 << 27  # many times any cache
ROUNDS = 7


class Peaks(NamedTuple):
    """The ceilings of the roofline."""

    gflops: float  # the best of several matrix products, by NumPy's BLAS
    product: str  # its shape
    triad_gbps: float  # STREAM triad a = b + s c: three arrays moved
    fill_gbps: float  # one array written and none read, past the caches where the system's memset knows how
    cache_bytes: int  # the last-level cache; 0 where the system does not say

    @property
    def gbps(self) -> float:
        return max(self.triad_gbps, self.fill_gbps)


def better(first: Peaks, second: Peaks) -> Peaks:
    """The higher of each figure: other work on the machine can only lower them."""
    faster = max(first, second, key=lambda p: p.gflops)
    triad_gbps = max(first.triad_gbps, second.triad_gbps)
    return faster._replace(triad_gbps=triad_gbps, fill_gbps=max(first.fill_gbps, second.fill_gbps))


def measure_peaks(dtype: str) -> Peaks:
    """A second or two of work, on as many threads as are set."""
    gflops, product = max(product_gflops(dtype, *shape) for shape in PRODUCTS)
    return Peaks(gflops, product, *bandwidths(dtype), last_level_cache())


def best_seconds(call: Callable[[], Any]) -> float:
    call()
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def product_gflops(dtype: str, m: int, n: int, k: int) -> tuple[float, str]:
    rng = np.random.default_rng(0)
    a, b, out = rng.random((m, k)).astype(dtype), rng.random((k, n)).astype(dtype), np.empty((m, n), dtype)
    return 2 * m * n * k / best_seconds(lambda: np.matmul(a, b, out=out)) * 1e-9, f"{m} x {n} x {k}"


@jit
def triad(a, b, c, factor, start, stop):  # type: ignore[no-untyped-def]
    a, b, c = a[start:stop], b[start:stop], c[start:stop]
    for i in range(a.size):
        a[i] = b[i] + factor * c[i]


def bandwidths(dtype: str) -> tuple[float, float]:
    """GB/s of the triad and of a fill."""
    count = ARRAY_BYTES // np.dtype(dtype).itemsize
    a, b, c = (np.full(count, value, dtype) for value in (0, 1, 2))
    factor = b.dtype.type(3)
    seconds = best_seconds(lambda: run_rows(triad, count, a, b, c, factor))

    def fill(start: int, stop: int) -> None:
        ctypes.memset(a[start:stop].ctypes.data, 0, a[start:stop].nbytes)

    return 3 * ARRAY_BYTES / seconds * 1e-9, ARRAY_BYTES / best_seconds(
        lambda: run_rows(fill, count, grain=count // num_threads())
    ) * 1e-9


def last_level_cache() -> int:
    """Bytes, from Linux; 0 elsewhere."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=0)
