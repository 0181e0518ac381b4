"""Signals that ask a process to end: Ctrl-C, the end of a job, a terminal that is closed."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minibert.errors import Interrupted

ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

SOON = 0.01  # seconds


def interrupt(number: int) -> None:
    """Raise Interrupted: where there is nothing to save."""
    raise Interrupted(number)


@contextmanager
def handled(handle: Callable[[int], None] = interrupt) -> Iterator[None]:
    """Within, the first signal calls `handle`, and a second one ends the process at once.

    One that is ignored, as a shell has SIGINT ignored by what it starts in the background and nohup SIGHUP, stays so.
    Handlers are a matter of the main thread; in others nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in ENDING if main}
    before = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def first(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        handle(number)

    def swallowed(unraisable: Any) -> None:
        """An exception that nobody above can see, in a callback of llvmlite say: it is raised again, after that."""
        if isinstance(unraisable.exc_value, Interrupted):
            stopped_by = unraisable.exc_value.number
            signal.signal(signal.SIGALRM, lambda number, frame: handle(stopped_by))
            signal.setitimer(signal.ITIMER_REAL, SOON)
        else:
            hook(unraisable)

    for number in before:
        signal.signal(number, first)
    hook, sys.unraisablehook = sys.unraisablehook, swallowed
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
