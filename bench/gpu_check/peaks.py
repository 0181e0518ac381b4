"""What this device can do, measured in this run: the ceilings that kernels and steps are held against."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bench.gpu_check.clock import EventClock, Times, WallClock, clock_of, timed
from bench.gpu_check.part import Run
from minibert.backends.base import dtype_of
from minibert.kernels.adamw import square_norm

COPY_BYTES = 1 << 31  # of each of the two arrays, where memory allows: many times any cache
PRODUCT = 8192  # m, n and k
MODES = {"float32": ("float32", "float32"), "tf32": ("float32", "tf32"), "bfloat16": ("bfloat16", "float32")}
SAMPLES, SECONDS = 15, 1.5


class Peaks(NamedTuple):
    """The ceilings, read back by later parts. The best sample counts: other work can only lower it."""

    copy_gbps: float  # bytes read and bytes written; the better of memcpy and a kernel
    memory_gbps: float  # the highest of copy, read and fill: nothing that is right is above it
    tflops: dict[str, float]  # by mode


def peaks(run: Run) -> None:
    """Copy, read and fill of a large array; products of random matrices in each mode."""
    with run.at_speed() as backend:
        clock = clock_of(backend)
        nbytes = 1 << 16 if run.settings.tiny else min(COPY_BYTES, backend.driver.memory()[0] // 64 * 16)
        run.keep(clock=type(clock).__name__, bytes=nbytes)
        bandwidths: dict[str, Any] = {}
        run.keep(bandwidth=bandwidths)
        for name, (moved, times) in memory_times(backend, clock, nbytes).items():
            bandwidths[name] = {"gbps": moved / times.best * 1e-6, "gbps_median": moved / times.median * 1e-6}
            bandwidths[name] |= times.facts()
            run.say(f"{name}: {bandwidths[name]['gbps']:.4g} GB/s")
            run.write()
        backend.pool.trim()
        products: dict[str, Any] = {}
        run.keep(product=products)
        size = 32 if run.settings.tiny else PRODUCT
        for mode in MODES:
            times = product_times(backend, clock, mode, size)
            rate = 2 * size**3 * 1e-9
            products[mode] = {"tflops": rate / times.best, "tflops_median": rate / times.median, "size": size}
            products[mode] |= times.facts()
            run.say(f"{mode}: {products[mode]['tflops']:.4g} TFLOP/s")
            run.write()


def memory_times(backend: Any, clock: WallClock | EventClock, nbytes: int) -> dict[str, tuple[int, Times]]:
    """(bytes moved, times) of each way through memory."""
    source, target = (backend.empty((nbytes // 4,), np.float32) for _ in range(2))
    block = backend.asarray(random_floats(min(1 << 24, nbytes // 4)))
    for start in range(0, source.size, block.size):  # the host need not hold all of it
        part = source[start : start + block.size]
        backend.copy_into(part, block[: part.size])
    backend.copy_into(target, source)
    found = {}
    if isinstance(clock, EventClock):
        runtime, stream = clock.cupy.cuda.runtime, clock.stream

        def memcpy(_: int) -> None:
            runtime.memcpyAsync(target.address, source.address, nbytes, runtime.memcpyDeviceToDevice, stream.ptr)

        found["memcpy"] = 2 * nbytes, timed(clock, memcpy, SAMPLES, SECONDS)
    ways = {
        "copy": (2 * nbytes, lambda _: backend.copy_into(target, source)),
        "read": (nbytes, lambda _: backend.run(square_norm, source)),
        "fill": (nbytes, lambda _: backend.driver.fill(target.address, nbytes, 1)),
    }
    return found | {name: (moved, timed(clock, work, SAMPLES, SECONDS)) for name, (moved, work) in ways.items()}


def product_times(backend: Any, clock: WallClock | EventClock, mode: str, size: int) -> Times:
    """Of a product of two (size, size) matrices of random numbers: zeros are faster."""
    dtype, product_mode = MODES[mode]
    values = np.resize(random_floats((1 << 20) + 7), (size, size))
    a, b = (backend.asarray(v, dtype=dtype_of(dtype)) for v in (values, values[::-1]))
    out = backend.empty((size, size), dtype_of(dtype))
    with products_in(backend, product_mode):
        return timed(clock, lambda _: backend.gemm(a, b, out=out), SAMPLES, SECONDS)


class products_in:
    """A block in which float32 products are done in `mode`."""

    def __init__(self, backend: Any, mode: str) -> None:
        self.backend, self.mode, self.before = backend, mode, backend.product_mode

    def __enter__(self) -> None:
        self.backend.product_mode = self.mode

    def __exit__(self, *_: Any) -> None:
        self.backend.product_mode = self.before


def random_floats(count: int) -> np.ndarray:
    return np.random.default_rng(11).standard_normal(count, dtype=np.float32)


def measured(run: Run) -> Peaks | None:
    """What the part found, if it ran to its end."""
    found = run.earlier("peaks")
    rates = {name: way["gbps"] for name, way in found.get("bandwidth", {}).items()}
    products = {mode: one["tflops"] for mode, one in found.get("product", {}).items()}
    if "copy" not in rates or len(products) < len(MODES):
        return None
    return Peaks(max(rates["copy"], rates.get("memcpy", 0.0)), max(rates.values()), products)
