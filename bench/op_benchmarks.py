"""The ops for pytest-benchmark: `pytest bench/op_benchmarks.py --benchmark-only -k 'softmax and numba'`.

Every op of the registry on every backend that runs here, at its BERT shape; pytest-benchmark's own options compare,
save and sort them. `extra_info` holds flops, bytes and the share of the roofline's limit (of the median; none where it
was measured faster than the machine can be). An op that writes in place gets fresh inputs before each round.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench.timing.op_timing import Inputs, aligned, judged, of_one, peaks_of
from minibert import backends
from minibert.errors import pip_install
from minibert.kernels import OPS, Op
from minibert.kernels.op import BertSize
from minibert.kernels.readings import cost
from minibert.lab.conform.judge import expect

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks

try:
    import pytest_benchmark  # noqa: F401
except ImportError:
    pytest.skip(f"pytest-benchmark is not installed; {pip_install('[bench]')}", allow_module_level=True)

ROUNDS = 9


@cache
def peaks() -> Peaks:
    """The machine's, once in a run."""
    from minibert.lab.measure.peaks import measure_peaks

    return measure_peaks()


@cache
def launch_cost(name: str) -> float:
    from minibert.lab.measure.peaks import launch_seconds

    return launch_seconds(backends.get(name))


@pytest.mark.parametrize("backend", [place.name for place in backends.usual()])
@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_op(op: Op, backend: str, benchmark: Any) -> None:
    place = backends.get(backend)
    if place.emulated:
        pytest.skip(f"{backend} plays another machine: its times are no machine's")
    inputs = Inputs(op.bench(np.random.default_rng(0), BertSize()), "float32")
    arrays = inputs.on(place)

    def call(*given: Any) -> None:
        place.run(op, *given, **inputs.params)
        place.synchronize()

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(place.asarray(aligned(a)) for a in inputs.host), {}

    found = judged(op, place, inputs, expect(op, inputs.host, inputs.params, "float32"))
    assert not found.problem, found.problem
    benchmark.group = op.name
    call(*fresh()[0])  # which may compile
    if op.writes:
        benchmark.pedantic(call, setup=fresh, rounds=ROUNDS)
    else:
        benchmark(call, *arrays)
    work = cost(op, *inputs.host, **inputs.params)
    benchmark.extra_info.update(backend=backend, by=place.by(op), flops=work.flops, bytes=work.bytes)
    if benchmark.stats is not None and (limits := peaks_of(place, peaks())) is not None:  # None: --benchmark-disable
        benchmark.extra_info.update(limit_facts(op, place, inputs, benchmark.stats.stats, limits))


def limit_facts(op: Op, place: Any, inputs: Inputs, stats: Any, limits: Peaks) -> dict[str, Any]:
    """What sets the limit, and the share of it; of an impossible time there is no share."""
    seconds = {"median": stats.median, "p20": stats.q1, "p80": stats.q3, "all": list(stats.data)}
    found = of_one(op, place, inputs, seconds).against(limits, launch_cost(place.name))
    return {"limit": found.limit, "limit_share": found.limit_share, "note": found.note}
