"""Each kernel at the shapes of BERT base, against what its bytes and flops cost at this device's measured peaks.

Arrays rotate, results too, through several times the cache: the figures are of memory. A figure above a peak is no
figure: it is refused ("impossible").
"""

from __future__ import annotations

import gc
import math
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bench.gpu_check.clock import Times, clock_of, timed
from bench.gpu_check.part import Failed, Run
from bench.gpu_check.peaks import MODES, Peaks, measured, products_in
from minibert.backends.base import dtype_of
from minibert.kernels import OPS, Op
from minibert.kernels.op import BertSize, Sample, outputs
from minibert.kernels.readings import Cost, cost
from minibert.lab.conform.judge import stored_as

SIZES = {
    "B 32, T 128": BertSize(32, 128, 768, 12, 3072, 30522, 614),
    "B 64, T 512": BertSize(64, 512, 768, 12, 3072, 30522, 4915),
}
TINY = {"B 2, T 8": BertSize(2, 8, 32, 2, 64, 96, 3)}
JUDGED = ("elementwise", "activation", "dropout", "layer_norm", "adamw")  # families of element-wise and norm kernels
TARGET = 0.8  # of the copy bandwidth
LAUNCH_BOUND = 1e-5  # seconds: below this floor, a launch costs a good part of the time
PRODUCTS = ("matmul", "linear", "linear_grad", "linear_gelu", "linear_cross_entropy")
CACHES = 3  # times the cache, that arrays rotate through
CACHE = 64 << 20  # bytes, where the device does not say
MOST_SETS = 48
SAMPLES, SECONDS = 21, 0.4
IMPOSSIBLE = "impossible"


class Tiled(np.random.Generator):
    """Random numbers of which long arrays repeat a million: drawing a hundred million takes a CPU too long."""

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        count = math.prod(size) if isinstance(size, tuple) else size or 1
        if count <= 1 << 20:
            return super().standard_normal(size, dtype, out)
        return np.resize(super().standard_normal((1 << 20) + 7, np.float32), size)


class Prepared(NamedTuple):
    """An op with arrays on the device, and the work it cannot avoid."""

    op: Op
    arrays: tuple[Any, ...]
    params: Mapping[str, Any]
    work: Cost


def kernels(run: Run) -> None:
    """Times of every op that has a kernel, in float32 and bfloat16; products in TF32 as well."""
    peaks = measured(run)
    if peaks is None:
        run.skip("shares of the peaks: they were not measured")
    rows: list[dict[str, Any]] = []
    sizes = TINY if run.settings.tiny else SIZES
    run.keep(sizes={name: size._asdict() for name, size in sizes.items()}, target=TARGET, rows=rows)
    other_bits: list[str] = []
    with run.at_speed() as backend:
        clock = clock_of(backend)
        copies = Copies(backend, clock)
        for label, size in sizes.items():
            for op in OPS.values():
                for mode in modes_of(run, op):
                    if run.left() < 3:
                        run.skip(f"{op.name} in {mode} at {label}, and what follows: the time is up")
                        return demand_same_bits(other_bits)
                    run.say(f"{label}, {mode}: {op.name}")
                    row = {"op": op.name, "mode": mode, "size": label, "by": backend.by(op)}
                    rows.append(row)
                    try:
                        row.update(one(run, clock, copies, op, mode, size, peaks))
                        if row.get("same_bits") is False:
                            other_bits.append(f"{op.name} in {mode} at {label}")
                    except Exception as error:
                        row["error"] = f"{type(error).__name__}: {error}"
                    gc.collect()
                    backend.pool.trim()
                    run.write()
    demand_same_bits(other_bits)


def demand_same_bits(other_bits: Sequence[str]) -> None:
    if other_bits:
        raise Failed(f"a run after the timing gave other bits than one before: {', '.join(other_bits)}")


def modes_of(run: Run, op: Op) -> list[str]:
    """In which an op is timed: in none if it launches nothing; in TF32 only products, which alone know of it."""
    if run.backend.by(op) == "formula":
        return []
    if run.settings.tiny and op.name not in PRODUCTS:
        return ["float32"]
    return [mode for mode in ("bfloat16", "float32", "tf32") if mode != "tf32" or op.name in PRODUCTS]


@lru_cache(maxsize=1)
def bench_sample(op: Op, size: BertSize) -> Sample:
    """Kept for the next mode."""
    return op.bench(Tiled(np.random.PCG64(5)), size)


def one(run: Run, clock: Any, copies: Copies, op: Op, mode: str, size: BertSize, peaks: Peaks | None) -> dict[str, Any]:
    """The row of one op."""
    dtype, product_mode = MODES[mode]
    backend = run.backend
    with products_in(backend, product_mode):
        prepared = prepare(backend, op, size, dtype)
        digest = None if op.writes else bits(backend, prepared)
        sets = rotating(run, prepared)
        few = run.settings.tiny
        times = timed(clock, launches(backend, prepared, sets), 3 if few else SAMPLES, SECONDS)
        same = None if digest is None else digest == bits(backend, prepared)
    alike = copies.times(prepared.work.bytes, len(sets), few)
    found = shares(op, prepared.work, times, mode, peaks)
    if run.emulated:
        found.pop("target_met", None)  # a CPU has no part in that
    return {
        **times.facts(), "sets": len(sets), "flops": prepared.work.flops, "bytes": prepared.work.bytes,
        "same_bits": same, "same_size_copy_ms": alike.median, **found,
    }  # fmt: skip


def shares(op: Op, work: Cost, times: Times, mode: str, peaks: Peaks | None) -> dict[str, Any]:
    """Rates, the share of the floor and whether the target is met; a rate above its peak is none."""
    if peaks is None:
        return {"note": "no peaks"}
    seconds = times.median * 1e-3
    by_bytes, by_flops = work.bytes / (peaks.memory_gbps * 1e9), work.flops / (peaks.tflops[mode] * 1e12)
    floor = max(by_bytes, by_flops)
    found: dict[str, Any] = {
        "bound_by": "flops" if by_flops > by_bytes else "bytes",
        "floor_ms": floor * 1e3,
        "share": floor / seconds,
        "gbps": work.bytes / seconds * 1e-9,
        "tflops": work.flops / seconds * 1e-12,
        "of_copy": work.bytes / seconds / (peaks.copy_gbps * 1e9),
        "note": "",
    }
    if found["share"] > 1:
        return {name: None for name in found} | {"floor_ms": floor * 1e3, "note": IMPOSSIBLE}
    if op.family.rsplit(".", 1)[-1] in JUDGED:
        found["target_met"] = found["of_copy"] >= TARGET
        found["note"] = "launch-bound" if floor < LAUNCH_BOUND else ""
    if times.behind > times.samples // 2:
        found["note"] = "host-bound"
    return found


# ------------------------------------------------------------------------------------------------------------- arrays


def prepare(backend: Any, op: Op, size: BertSize, dtype: str) -> Prepared:
    """`op` at `size`: a gradient's arrays are those that its forward op hands to it, else the op's own bench sample."""
    forward = OPS.get(op.name.removesuffix("_grad"))
    if op.name.endswith("_grad") and forward is not None and forward.vjp is not None:
        found = handed_on(backend, forward, op, size, dtype)
        if found is not None:
            return found
    sample = bench_sample(op, size)
    arrays = stored(op, sample, dtype)
    return Prepared(op, tuple(map(backend.asarray, arrays)), sample.params, cost(op, *arrays, **sample.params))


def handed_on(backend: Any, forward: Op, op: Op, size: BertSize, dtype: str) -> Prepared | None:
    """Run `forward` and its gradient on the device, and take what `op` was called with; None if it was not called."""
    sample = bench_sample(forward, size)
    arrays = [backend.asarray(a) for a in stored(forward, sample, dtype)]
    seen: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []

    def watch(called: Op, given: tuple[Any, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        if called is op and not seen:
            seen.append((given, dict(params)))
        return call()

    outs = outputs(backend.run(forward, *arrays, **sample.params))
    g = Tiled(np.random.PCG64(6)).standard_normal(tuple(outs[0].shape), np.float32)
    assert forward.vjp is not None
    with backend.watched_by(watch):
        forward.vjp(backend.run, backend.asarray(g, dtype=outs[0].dtype), outs, *arrays, **sample.params)
    if not seen:
        return None
    given, params = seen[0]
    return Prepared(op, given, params, cost(op, *map(shape_of, given), **params))


def stored(op: Op, sample: Sample, dtype: str) -> list[np.ndarray]:
    """The arrays of a sample, in the dtype in which each is stored; indices as the model has them, in int32."""
    arrays = [np.asarray(a) for a in sample.arrays]
    kinds = [
        kind or (np.int32 if a.dtype == np.int64 else a.dtype)
        for a, kind in zip(arrays, stored_as(op, arrays, dtype), strict=True)
    ]
    return [np.asarray(a, kind) for a, kind in zip(arrays, kinds, strict=True)]


def shape_of(x: Any) -> np.ndarray:
    """What `cost` needs of a device array: integers as they are, of floats the shape and dtype."""
    return x.host if x.host is not None else np.broadcast_to(np.zeros((), x.dtype), x.shape)


def rotating(run: Run, prepared: Prepared) -> list[tuple[Any, ...]]:
    """As many copies of the arrays as take up several times the cache; integers, of which the host knows, once."""
    if run.settings.tiny:
        return [prepared.arrays]
    cache = run.earlier("machine").get("l2_bytes") or CACHE
    each = max(1, prepared.work.bytes)
    count = min(MOST_SETS, 1 + math.ceil(CACHES * cache / each), 1 + run.backend.driver.memory()[0] // (4 * each))
    copies = [tuple(a if a.host is not None else a.copy() for a in prepared.arrays) for _ in range(count - 1)]
    return [prepared.arrays, *copies]


def launches(backend: Any, prepared: Prepared, sets: Sequence[tuple[Any, ...]]) -> Callable[[int], None]:
    """One call on each of the sets in turn. Results are held as long, so that they too lie in other memory."""
    held: deque[Any] = deque(maxlen=len(sets))
    turn = iter(range(1 << 62))

    def work(_: int) -> None:
        held.append(backend.run(prepared.op, *sets[next(turn) % len(sets)], **prepared.params))

    return work


def bits(backend: Any, prepared: Prepared) -> list[int]:
    """A checksum of each output."""
    results = outputs(backend.run(prepared.op, *prepared.arrays, **prepared.params))
    return [zlib.crc32(backend.numpy(r).tobytes()) for r in results]


class Copies:
    """Times of plain copies that move as many bytes as an op does, measured alike: what a launch costs is in both."""

    def __init__(self, backend: Any, clock: Any) -> None:
        self.backend, self.clock = backend, clock
        self._known: dict[int, Times] = {}

    def times(self, nbytes: int, sets: int, few: bool) -> Times:
        """Of a copy that reads nbytes / 2 and writes as many."""
        count = max(4, nbytes // 8)
        if count not in self._known:
            kind = dtype_of("float32")
            pairs = [(self.backend.zeros((count,), kind), self.backend.zeros((count,), kind)) for _ in range(sets)]
            turn = iter(range(1 << 62))

            def work(_: int) -> None:
                source, target = pairs[next(turn) % len(pairs)]
                self.backend.copy_into(target, source)

            self._known[count] = timed(self.clock, work, 3 if few else SAMPLES, SECONDS / 2)
        return self._known[count]
