"""What one look at a kernel tells: is it right, how wrong, how fast, how near the limit. `minibert watch` repeats it.

A look is taken in a process of its own (`python -m minibert.cli.look`), so that each begins with what is on disk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minibert.backends import Backend
from minibert.kernels import Op
from minibert.kernels.op import BertSize
from minibert.kernels.readings import cost
from minibert.lab.conform.check import CheckResult, planned, run_check

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks

SIZE = BertSize()  # the shapes that are timed: a step of MiniLM
SMALL = BertSize(2, 32, 128, 4, 512, 1000, 16)  # whose traffic is counted
LEAST_SECONDS = 0.15  # of timing


@dataclass(frozen=True)
class Look:
    """One op after a change of its kernel."""

    op: str
    by: str
    ok: bool
    message: str  # of the first check that fails
    checks: int
    ulp_max: float | None
    bound_share: float | None
    gradient: str  # "exact", "wrong" or "": it has none
    seconds: float | None  # of a call at BERT's shape; None where time says nothing
    limit_share: float | None  # the time that the machine's limit allows over it; above 1: the data fit a cache
    sectors: int | None  # emulator: sectors of 32 bytes of global memory that a call at a small BERT's shape moves
    ideal_sectors: int | None  # that would hold what its lines asked for


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def look(op: Op, backend: Backend, peaks: Peaks | None, dtypes: Sequence[str] | None = None) -> Look:
    """Check one op on a backend, and time it where its time means something."""
    results: list[CheckResult] = []
    for name, dtype in planned(backend, op, dtypes):
        results.append(run_check(name, op, backend, dtype))
        if not results[-1].ok:
            break  # a person mends one thing at a time
    failed = next((r for r in results if not r.ok), None)
    gradient = next((r for r in results if r.check == "gradient"), None)
    seconds = share = sectors = ideal = None
    if failed is None and backend.emulated:
        sectors, ideal = _traffic(op, backend)
    elif failed is None:
        seconds, share = _timed(op, backend, peaks)
    return Look(
        op.name, backend.by(op), failed is None, "" if failed is None else failed.message, len(results),
        _worst(results, "ulp_max"), _worst(results, "bound_share"),
        "" if gradient is None else "exact" if gradient.ok else "wrong", seconds, share, sectors, ideal,
    )  # fmt: skip


def _worst(results: Sequence[CheckResult], measure: str) -> float | None:
    found = [getattr(r, measure) for r in results if r.check == "follows_formula" and r.dtype != "float64"]
    return max((v for v in found if v is not None), default=None)


def _timed(op: Op, backend: Backend, peaks: Peaks | None) -> tuple[float, float | None]:
    """The median time of a call, and the time that peaks allow over it. An op that works in place goes on with it."""
    host, params = _bench_inputs(op, SIZE)
    arrays = [backend.asarray(a) for a in host]

    def call() -> None:
        backend.run(op, *arrays, **params)
        backend.synchronize()

    call()
    times: list[float] = []
    while sum(times) < LEAST_SECONDS or len(times) < 5:
        times.append(_seconds(call))
    seconds = statistics.median(times)
    work = cost(op, *host, **params)
    if peaks is None:
        return seconds, None
    from minibert.lab.measure.roofline import floor

    return seconds, floor(work, peaks).seconds / seconds


def _traffic(op: Op, backend: Any) -> tuple[int, int]:
    """Sectors that a call on the emulator moves, and that it needs."""
    host, params = _bench_inputs(op, SMALL)
    arrays = [backend.asarray(a) for a in host]
    with backend.emulator.set(traffic=True):
        backend.emulator.traffic.clear()
        backend.run(op, *arrays, **params)
        backend.synchronize()
        moved = [t for t in backend.emulator.traffic.values() if t.space == "global"]
    return sum(t.sectors for t in moved), sum(t.ideal_sectors for t in moved)


def _bench_inputs(op: Op, size: BertSize) -> tuple[list[np.ndarray], dict[str, Any]]:
    sample = op.bench(np.random.default_rng(0), size)
    arrays = [np.asarray(a) for a in sample.arrays]
    return [a.astype(np.float32) if a.dtype.kind == "f" else a for a in arrays], dict(sample.params)
