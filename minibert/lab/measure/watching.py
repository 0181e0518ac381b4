"""What one look at a kernel tells: is it right, how wrong, how fast, how near the limit. `minibert watch` repeats it.

A look is taken in a process of its own (`python -m minibert.cli.look`), so that each begins with what is on disk.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minibert.backends import Backend
from minibert.kernels import Op
from minibert.kernels.op import BertSize, outputs
from minibert.kernels.readings import cost
from minibert.lab.conform.check import Broken, Case, CheckResult, Tally, gradient_verdict, planned, run_check

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
    gradient: str  # "exact", "wrong" or "": it has none, or none was computed
    seconds: float | None  # of a call at BERT's shape; None where time says nothing
    limit_share: float | None  # the time that the machine's limit allows over it; above 1: the data fit a cache
    sectors: int | None  # emulator: sectors of 32 bytes of global memory that a call at a small BERT's shape moves
    ideal_sectors: int | None  # that would hold what its lines asked for


def look(op: Op, backend: Backend, peaks: Peaks | None, dtypes: Sequence[str] | None = None, again: str = "") -> Look:
    """Check one op on a backend, and time it where its time means something.

    `again` goes behind the command that shows a failure again.
    """
    results: list[CheckResult] = []
    for name, dtype in planned(backend, op, dtypes):
        results.append(run_check(name, op, backend, dtype))
        if not results[-1].ok:
            break  # a person mends one thing at a time
    failed = next((r for r in results if not r.ok), None)
    problem = "" if failed is None else failed.message + again
    seconds = share = sectors = ideal = None
    try:
        if failed is None and backend.emulated:
            sectors, ideal = _traffic(op, backend)
        elif failed is None:
            seconds, share = _timed(op, backend, peaks)
    except Broken as error:
        problem = f"{op.name} on {backend.name} is wrong where it is timed: {error}"
    return Look(
        op.name, backend.by(op), not problem, problem, len(results),
        _worst(results, "ulp_max"), _worst(results, "bound_share"),
        gradient_verdict(results), seconds, share, sectors, ideal,
    )  # fmt: skip


def _worst(results: Sequence[CheckResult], measure: str) -> float | None:
    judged = [r for r in results if r.check in ("follows_formula", "part_in_step") and r.dtype != "float64"]
    found = [getattr(r, measure) for r in judged]
    return max((v for v in found if v is not None), default=None)


def _timed(op: Op, backend: Backend, peaks: Peaks | None) -> tuple[float, float | None]:
    """The median time of a call, and the time that peaks allow over it. An op that works in place goes on with it.

    The first result is judged before the others are timed, and the last one after. Raises Broken if one is wrong.
    """
    case = Case(op, backend, "float32", 0)
    given = case.part_in_step(SIZE)
    host, params = given.arrays, given.params
    arrays = case.upload(host)

    def call() -> Any:
        result = backend.run(op, *arrays, **params)
        backend.synchronize()
        return result

    Tally().judge(case, given, outputs(call()))
    times: list[float] = []
    while sum(times) < LEAST_SECONDS or len(times) < 5:
        began = time.perf_counter()
        last = call()
        times.append(time.perf_counter() - began)
    if not op.writes:
        Tally().judge(case, given, outputs(last), f", call {len(times) + 1}")
    seconds = statistics.median(times)
    work = cost(op, *host, **params)
    if peaks is None:
        return seconds, None
    from minibert.lab.measure.roofline import floor

    return seconds, floor(work, peaks).seconds / seconds


def _traffic(op: Op, backend: Any) -> tuple[int, int]:
    """Sectors that a call on the emulator moves, and that it needs. Raises Broken if its result is wrong."""
    case = Case(op, backend, "float32", 0)
    given = case.part_in_step(SMALL)
    arrays = case.upload(given.arrays)
    with backend.emulator.set(traffic=True):
        backend.emulator.traffic.clear()
        result = backend.run(op, *arrays, **given.params)
        backend.synchronize()
        moved = [t for t in backend.emulator.traffic.values() if t.space == "global"]
    Tally().judge(case, given, outputs(result))
    return sum(t.sectors for t in moved), sum(t.ideal_sectors for t in moved)
