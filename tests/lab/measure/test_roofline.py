"""What a time below the roofline is called: every one of them has a name, here and in the bench alike."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest

from bench.timing.op_timing import Timing
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import BertSize, outputs
from minibert.lab.measure.peaks import Peaks
from minibert.lab.measure.roofline import CACHE, IMPOSSIBLE, LAUNCH, NOTES, VIEW, Work, floor, note, total, work_of

PEAKS = Peaks(gflops=1.0, product="m", fma_gflops=2.0, triad_gbps=8.0, fill_gbps=4.0, cache_bytes=10**6)
MEGABYTE = 10**6


def test_every_share_above_the_limit_has_a_note_and_none_below_is_excused() -> None:
    met = set()
    for flops, moved, memory, calls, seconds, launch in product(
        (0, 10**5), (0, 10**3, MEGABYTE), (MEGABYTE // 2, 8 * MEGABYTE), (1, 3), (1e-6, 1e-4, 1e-3), (0.0, 2e-6, 1e-4)
    ):
        works = Counter({Work(flops, moved, max(moved, memory)): calls})
        share = floor(total(works), PEAKS, launch, calls).seconds / seconds
        said = note(works, seconds, PEAKS, launch)
        assert (said in (IMPOSSIBLE, CACHE, LAUNCH)) is (share > 1), (works, seconds, launch, share, said)
        met.add(said)
    assert met == {"", IMPOSSIBLE, CACHE, LAUNCH} and met - {""} < set(NOTES)


@pytest.mark.parametrize(
    ("works", "seconds", "said"),
    [
        ({Work(0, MEGABYTE, MEGABYTE): 4}, 4.9e-4, CACHE),  # 4 MB in all at 8 GB/s, each call's MB fits
        ({Work(0, MEGABYTE, 2 * MEGABYTE): 4}, 2.6e-4, CACHE),  # half of each fits
        ({Work(0, MEGABYTE, 2 * MEGABYTE): 4}, 2.4e-4, IMPOSSIBLE),  # and the other half takes 0.25 ms
        ({Work(0, MEGABYTE, MEGABYTE): 2, Work(0, MEGABYTE, 10**12): 2}, 2.4e-4, IMPOSSIBLE),
        ({Work(10**6, 1, 1): 4}, 1.9e-3, IMPOSSIBLE),  # 2 GFLOP/s and no more
        ({Work(0, 0, 9, view=True): 4}, 1e-3, VIEW),
        ({}, 1e-3, ""),
    ],
)
def test_what_a_cache_excuses_is_reckoned_call_by_call(works: dict[Work, int], seconds: float, said: str) -> None:
    assert note(works, seconds, PEAKS, 0.0) == said


def test_the_bench_says_the_same() -> None:
    """Its rows are of one call; the notes are those that a step of one call has."""
    for flops, moved, ms in product((10, 10**6), (10, MEGABYTE), (0.01, 0.1, 1.0)):
        seconds = {"median": ms * 1e-3, "p20": ms * 1e-3, "p80": ms * 1e-3, "all": [ms * 1e-3] * 3}
        row = Timing("gelu", "numba", "kernel", seconds, 3, flops, moved, moved).against(PEAKS, 0.0)
        assert row.note == note({Work(flops, moved, moved): 1}, ms * 1e-3, PEAKS, 0.0)


def test_a_view_moves_nothing_and_what_is_written_in_place_is_no_view() -> None:
    x = np.ones((4, 8), np.float32)
    view = work_of(OPS["slice_axis"], [x], {"axis": 0, "start": 0, "stop": 2}, [x[:2]])
    assert view.view and view.bytes == 0
    copied = work_of(OPS["slice_axis"], [x], {"axis": 0, "start": 0, "stop": 2}, [x[:2].copy()])
    assert not copied.view and copied.bytes == copied.memory == 4 * 8 * 4 + 2 * 8 * 4
    sample = OPS["adamw"].bench(np.random.default_rng(0), BertSize(1, 4, 8, 2, 16, 32, 2))
    arrays = [np.array(a) for a in sample.arrays]
    results = outputs(OPS["adamw"].formula(numpy_module, *arrays, **sample.params))
    assert OPS["adamw"].writes and not work_of(OPS["adamw"], arrays, sample.params, results).view
