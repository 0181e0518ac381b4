"""The process in which kernels are tried, as it is started and heard from here: see `lab.conform.guarded`."""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import minibert
from minibert.lab.conform.jobs import Job

WAITING = 4  # a process that waits for others, or for itself
LOOK_SECONDS = 0.2  # between two looks at how much it has worked
TRACEBACK_SECONDS = 1.0  # that a process which hangs has to say where it is
START_SECONDS = 120.0  # to begin, to read a kernel's file and to compile it


class Stopped(Exception):
    """Nothing more can be heard of the process."""


class Ended(Stopped):
    """The process ended while something was expected from it."""


class Hung(Stopped):
    """It told nothing for too long, and was killed."""


@cache
def unguarded() -> str:
    """Why this machine has no guarded memory; empty where it has."""
    try:
        from minibert.kernels.cpu import guard_pages
    except ImportError as error:
        return f"guarded memory needs Numba: {error}"
    if reason := guard_pages.unavailable():
        return reason
    try:
        guarded_process().wait_until_ready()
    except (Stopped, OSError) as error:
        return f"the process with guarded memory did not start: {error}"
    return ""


_process: GuardedProcess | None = None


def guarded_process() -> GuardedProcess:
    """A process that takes jobs: the same as before, as long as it lives and finds the modules that we find.

    A new one is ready in a second, in which other work can be done.
    """
    global _process
    if _process is not None and (_process.ended() or _process.place != place()):
        _end_process()
    if _process is None:
        _process = GuardedProcess()
    return _process


@atexit.register
def _end_process() -> None:
    global _process
    if _process is not None:
        _process.close()
    _process = None


def place() -> tuple[str, ...]:
    """Where names of files and modules are looked for."""
    return (os.getcwd(), *sys.path)


class GuardedProcess:
    """Starts at once, and takes jobs when it is ready."""

    def __init__(self, *, bounds: bool = False) -> None:
        from minibert.kernels.cpu import guard_pages

        with ExitStack() as stack:
            self.place = place()
            self._log = stack.enter_context(tempfile.TemporaryFile("a+b"))
            file = os.memfd_create("minibert-guarded")
            stack.callback(os.close, file)
            os.ftruncate(file, guard_pages.NOTE_BYTES)
            self.notes = guard_pages.Notes(file)
            ours, theirs = socket.socketpair()
            self._channel = stack.enter_context(Connection(ours.detach()))
            environment = dict(os.environ)
            if bounds:
                kept = stack.enter_context(tempfile.TemporaryDirectory())
                environment |= {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": kept, "MINIBERT_CACHE_DIR": kept}
            root = str(Path(str(minibert.__file__)).parents[1])
            environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, sys.path)])
            with theirs:
                self._child = subprocess.Popen(
                    [
                        sys.executable, "-m", "minibert.lab.conform.guarded_child",
                        str(theirs.fileno()), str(file), "bounds" if bounds else "",
                    ],
                    stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, env=environment,
                    pass_fds=(theirs.fileno(), file),
                )  # fmt: skip
            stack.callback(self._kill)
            self._ready = False
            self._stack = stack.pop_all()

    def __enter__(self) -> GuardedProcess:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """End it, if it has not ended."""
        self._stack.close()

    def wait_until_ready(self) -> None:
        """Raises Ended where it cannot guard its memory, with the reason."""
        if not self._ready:
            name, *reason = self.event(START_SECONDS)
            if name != "ready":
                raise Ended(*reason)
            self._ready = True

    def send(self, job: Job) -> None:
        """Raises Ended where nobody takes it."""
        self.wait_until_ready()
        try:
            self._channel.send(job)
        except OSError as error:
            raise Ended(str(error)) from None

    def event(self, seconds: float) -> tuple[Any, ...]:
        """The next thing that it tells. Raises Ended where nothing can come, Hung where nothing came for so long.

        That is so many seconds of its work, which others may slow down, or `WAITING` times as many in all.
        """
        work, end = self._work() + seconds, time.monotonic() + WAITING * seconds
        try:
            while not self._channel.poll(min(seconds, LOOK_SECONDS)):
                if self._work() > work or time.monotonic() > end:
                    self._kill(signal.SIGUSR1)
                    raise Hung(f"nothing came in {seconds:.0f} s")
            told: tuple[Any, ...] = self._channel.recv()
            return told
        except (EOFError, OSError):
            raise Ended(self.said()) from None

    def _work(self) -> float:
        """Seconds that its threads have worked."""
        fields = Path(f"/proc/{self._child.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # utime and stime of proc(5)

    def ended(self) -> bool:
        return self._child.poll() is not None

    def status(self) -> int:
        """How it ended, as subprocess has it."""
        return self._child.wait()

    def said(self) -> str:
        """What it printed."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def _kill(self, first: signal.Signals | None = None) -> None:
        """End it; `first` is the signal on which it says where it is."""
        if first is not None:
            self._child.send_signal(first)
            with suppress(subprocess.TimeoutExpired):
                self._child.wait(TRACEBACK_SECONDS)
        self._child.kill()
        self._child.wait()
