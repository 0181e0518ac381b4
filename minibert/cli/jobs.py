"""`--jobs`: parts of the work by other processes, each of which takes from the end what has not begun."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from typing import Any, Protocol, TypeVar

from minibert.errors import UserError

JOBS_HELP = "Processes that share the work; default: one for each core, up to 8."
MOST_USUAL_JOBS = 8  # the longest part ends last, however many there are

Part = TypeVar("Part")
Result = TypeVar("Result")


class Work(Protocol[Part, Result]):
    """What is shared. It is pickled, as the parts are, and what is known of them, and the results."""

    def parts(self) -> Sequence[Part]:
        """What there is to do, each by one process."""

    def begin(self) -> None:
        """Get ready, in another process, while the parts are found out and what is known of them."""

    def here(self, part: Part) -> Iterator[Result]:
        """The results of a part, in this process."""

    def known(self, part: Part) -> Any:
        """What another process should not find out by itself of a part. Another thread asks."""

    def there(self, part: Part, known: Any) -> list[Result]:
        """The results, in another process."""


def usual_jobs() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_USUAL_JOBS)


def in_jobs(work: Work[Part, Result], jobs: int) -> Iterator[Result]:
    """The results of all parts, in any order; some of them made in other processes, and told last.

    What a part raises is raised; UserError where another process was killed.
    """
    waiting: deque[Part] = deque()

    def taken(take: Callable[[], Part]) -> list[Part]:
        try:
            return [take()]
        except IndexError:  # another thread has had the last
            return []

    def there(pool: ProcessPoolExecutor) -> list[Result]:
        found: list[Result] = []
        while part := taken(waiting.pop):
            found += pool.submit(work.there, part[0], work.known(part[0])).result()
        return found

    if jobs == 1:
        for each in work.parts():
            yield from work.here(each)
        return
    others = jobs - 1
    # a fork would have locks that other threads hold; an interrupt ends them without a word
    pool = ProcessPoolExecutor(others, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL))
    with pool, ThreadPoolExecutor(others) as threads:
        for _ in range(others):
            pool.submit(work.begin)
        waiting.extend(work.parts())
        told: list[Future[list[Result]]] = [threads.submit(there, pool) for _ in range(others)]
        try:
            while part := taken(waiting.popleft):
                yield from work.here(*part)
            for future in told:
                yield from future.result()
        except BrokenProcessPool:
            raise UserError("a process of --jobs was killed: try --jobs 1") from None
        finally:
            waiting.clear()
            if not all(future.done() for future in told):
                for process in active_children():
                    process.terminate()
