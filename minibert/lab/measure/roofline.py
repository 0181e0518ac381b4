"""What an op must take under the machine's peaks, and what to call a time that is less.

The roofline: an op that needs so many flops and moves so many bytes takes at least the longer of both times (Williams,
Waterman, Patterson, *Roofline: an insightful visual performance model*, CACM 2009), and at least what a call costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minibert.kernels.op import Op
from minibert.kernels.readings import Cost, cost

if TYPE_CHECKING:
    from minibert.lab.measure.peaks import Peaks  # whose module compiles kernels

IMPOSSIBLE, CACHE, LAUNCH, VIEW = "impossible", "cache", "launch", "view"
NOTES = {
    IMPOSSIBLE: "above a measured limit, and no cache explains it: no figure (a busy machine lowers the limits)",
    CACHE: "more than the bandwidth of memory, of arrays that fit the last-level cache",
    LAUNCH: "a call costs less than the one by which a call's own cost was measured",
    VIEW: "nothing is moved: the result is a view",
}


class Floor(NamedTuple):
    """The least time that an op can take, and what sets it."""

    seconds: float
    limit: str  # "arithmetic", "memory" or "launch"


class Work(NamedTuple):
    """What one call of an op cannot avoid, and what a cache would have to hold to spare it the way to memory."""

    flops: int
    bytes: int  # 0 of a view
    memory: int  # bytes of all its arrays
    view: bool = False


def floor(work: Cost, peaks: Peaks, launch_seconds: float = 0.0, calls: int = 1) -> Floor:
    """The roofline's time of this work, done in so many calls of which each costs `launch_seconds` of itself."""
    return max(
        Floor(work.flops / peaks.limit_gflops * 1e-9, "arithmetic"),
        Floor(work.bytes / peaks.gbps * 1e-9, "memory"),
        Floor(calls * launch_seconds, "launch"),
    )


def work_of(op: Op, arrays: Sequence[np.ndarray], params: Mapping[str, Any], results: Sequence[np.ndarray]) -> Work:
    """The work of a call that gave these results."""
    least, made = cost(op, *arrays, **params), () if op.writes else results
    view = len(made) == 1 and any(np.may_share_memory(made[0], a) for a in arrays)
    memory = min(least.bytes, sum(a.nbytes for a in (*arrays, *made)))
    return Work(least.flops, 0 if view else least.bytes, memory, view)


def total(works: Mapping[Work, int]) -> Cost:
    """Of so many calls of each."""
    return Cost(sum(w.flops * n for w, n in works.items()), sum(w.bytes * n for w, n in works.items()))


def note(works: Mapping[Work, int], seconds: float, peaks: Peaks, launch_seconds: float) -> str:
    """One of NOTES for the time that so many calls of each took together, or empty.

    Every time below the roofline's has a note. Traffic above the bandwidth is excused by a cache, for as many bytes of
    a call's arrays as it holds; arithmetic above the rate of multiply-adds in registers by nothing.
    """
    done = total(works)
    past_cache = sum(n * w.bytes * max(0.0, 1 - peaks.cache_bytes / w.memory) for w, n in works.items() if w.memory)
    reach = seconds * 1e9
    if done.flops > peaks.limit_gflops * reach or past_cache > peaks.gbps * reach:
        return IMPOSSIBLE
    if done.bytes > peaks.gbps * reach:
        return CACHE
    if seconds < floor(done, peaks, launch_seconds, sum(works.values())).seconds:
        return LAUNCH
    return VIEW if works and all(w.view for w in works) else ""
