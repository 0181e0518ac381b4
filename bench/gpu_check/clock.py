"""Times of work on a device, of memory and not of caches.

On a GPU: between two events of its own stream. Work is queued behind a blocker, a kernel that reads a large array, so
that the host is ahead and gaps between launches are the device's own; the blocker also leaves the caches full of what
nobody needs, none of it waiting to be written. A sample whose host fell behind is taken again behind more blockers.
Elsewhere: the wall clock around many launches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.adamw import square_norm

SAMPLE_SECONDS = 2e-4  # that a sample lasts at least
MOST_CALLS = 256  # in a sample: fewer than a stream queues
MOST_BLOCKERS = 64
BLOCKER_BYTES = 1 << 30

Work = Callable[[int], Any]  # called with 0, 1, 2, ...: which of several sets of arrays to use


class Times(NamedTuple):
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float
    best: float
    samples: int
    calls: int  # in each sample
    behind: int  # samples in which the host may have kept the device waiting

    def facts(self) -> dict[str, Any]:
        return {
            "ms": self.median, "ms_p20": self.p20, "ms_p80": self.p80, "ms_best": self.best, "samples": self.samples,
            "calls": self.calls, "host_behind": self.behind,
        }  # fmt: skip


class WallClock:
    """Seconds of the host, from idle to idle."""

    most_calls = 1

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    @contextmanager
    def running(self) -> Iterator[None]:
        """All samples are taken within."""
        yield

    def sample(self, work: Work, calls: int) -> tuple[float, bool]:
        """Seconds of one call, and whether the host was behind."""
        self.backend.synchronize()
        began = time.perf_counter()
        for i in range(calls):
            work(i)
        self.backend.synchronize()
        return (time.perf_counter() - began) / calls, False


class EventClock:
    """Seconds of the GPU. Everything runs in a stream of the clock's own while it is `running`."""

    most_calls = MOST_CALLS

    def __init__(self, backend: Any) -> None:
        import cupy

        self.backend, self.cupy = backend, cupy
        self.stream = backend.driver.new_stream()
        self.start, self.stop = cupy.cuda.Event(), cupy.cuda.Event()
        count = min(BLOCKER_BYTES, backend.driver.memory()[0] // 16) // 4
        self.large = backend.zeros((count,), np.float32)
        self.blockers = 1

    @contextmanager
    def running(self) -> Iterator[None]:
        self.backend.synchronize()  # the pool hands out blocks in the order of one stream
        with self.backend.driver.on(self.stream):
            yield
            self.backend.synchronize()

    def sample(self, work: Work, calls: int) -> tuple[float, bool]:
        while True:
            for _ in range(self.blockers):
                self.backend.run(square_norm, self.large)
            self.start.record(self.stream)
            for i in range(calls):
                work(i)
            behind = self.start.done  # the device came past it before all was queued
            self.stop.record(self.stream)
            self.backend.synchronize()
            if not behind or self.blockers >= MOST_BLOCKERS:
                return self.cupy.cuda.get_elapsed_time(self.start, self.stop) * 1e-3 / calls, behind
            self.blockers *= 2


def clock_of(backend: Any) -> WallClock | EventClock:
    """The best clock that a backend's device has."""
    return WallClock(backend) if backend.emulated else EventClock(backend)


def timed(clock: WallClock | EventClock, work: Work, samples: int, seconds: float) -> Times:
    """Median and spread of `samples` samples, or of as many as `seconds` allow, three at least; warmed up before."""
    began = time.perf_counter()
    if isinstance(clock, EventClock):
        clock.blockers = 1
    with clock.running():
        for i in range(2):
            work(i)
        guess, _ = clock.sample(work, 1)
        calls = int(min(clock.most_calls, max(1, SAMPLE_SECONDS // max(guess, 1e-7))))
        taken: list[tuple[float, bool]] = []
        while len(taken) < samples and (len(taken) < 3 or time.perf_counter() - began < seconds):
            taken.append(clock.sample(work, calls))
    ms = np.array([t for t, _ in taken]) * 1e3
    p20, median, p80 = np.percentile(ms, [20, 50, 80])
    return Times(
        float(median), float(p20), float(p80), float(ms.min()), len(taken), calls, sum(behind for _, behind in taken)
    )  # fmt: skip
