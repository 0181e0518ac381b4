"""`--jobs`: parts of the work by other processes, each of which takes from the end what has not begun."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import TypeVar

from minibert.errors import UserError

JOBS_HELP = "Processes that share the work; default: one for each core, up to 8."
MOST_USUAL_JOBS = 8  # the longest part ends last, however many there are

Part = TypeVar("Part")
Result = TypeVar("Result")


def usual_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_USUAL_JOBS)


def in_jobs(
    parts: Sequence[Part], here: Callable[[Part], Iterator[Result]], work: Callable[[Part], list[Result]], jobs: int
) -> Iterator[Result]:  # fmt: skip
    """What `here` yields for each part, in any order; some of them done by `work` in other processes, and told last.

    `work` and the parts are pickled. What either raises is raised; UserError where another process was killed.
    """
    waiting, others = deque(parts), min(jobs, len(parts)) - 1

    def taken(take: Callable[[], Part]) -> list[Part]:
        try:
            return [take()]
        except IndexError:  # another thread has had the last
            return []

    def there(pool: ProcessPoolExecutor) -> list[Result]:
        found: list[Result] = []
        while part := taken(waiting.pop):
            found += pool.submit(work, *part).result()
        return found

    if others < 1:
        for each in parts:
            yield from here(each)
        return
    # a fork would have locks that other threads hold; an interrupt ends them without a word
    pool = ProcessPoolExecutor(others, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL))
    with pool, ThreadPoolExecutor(others) as threads:
        told: list[Future[list[Result]]] = [threads.submit(there, pool) for _ in range(others)]
        try:
            while part := taken(waiting.popleft):
                yield from here(*part)
            for future in told:
                yield from future.result()
        except BrokenProcessPool:
            raise UserError("a process of --jobs was killed: try --jobs 1") from None
        finally:
            waiting.clear()
            if not all(future.done() for future in told):
                for process in active_children():
                    process.terminate()
