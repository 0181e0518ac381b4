"""The process in which a kernel is tried on guarded arrays; `lab.conform.guarded` starts it and hears what it tells.

It takes jobs and tells events, each a tuple that begins with its name, through a connection of multiprocessing:

    ready | unavailable REASON | compiling YES
    call WAY, INPUT, ADDRESSES      the kernel is about to be called
    took SECONDS                    it returned
    same CALLS                      repeated so often, it gave the same bits
    bounds FILE, LINE, INDEX, SIZE, AXIS      an index that Numba's bounds check refused
    raised TEXT | problem TEXT | end
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from minibert import backends
from minibert.backends import Backend
from minibert.kernels import OPS, Op
from minibert.kernels.drawing import Drawn
from minibert.kernels.op import output_name, outputs
from minibert.lab.conform.jobs import REPEATS, Job, given
from minibert.lab.conform.layouts import LAYOUTS
from minibert.lab.conform.own_kernels import load_kernels
from minibert.lab.conform.raised import what_raised

FILL, OTHER_FILL = 0xFF, 0x3F  # of bytes that nothing wrote: as floats NaN, and about 0.7
ALL_WAYS_SECONDS = 2.0  # of work, after which a slow kernel is called on each drawn input in one way only


def main() -> None:
    connection, notes_file, bounds = Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3] == "bounds"
    try:
        from minibert.kernels.cpu import guard_bounds, guard_pages

        if bounds:  # which refuses what the guard would see
            guard = guard_pages.Notes(notes_file)
            guard_bounds.note_bounds()
        else:
            guard = guard_pages.install(notes_file)
    except (ImportError, OSError) as error:
        connection.send(("unavailable", str(error)))
        return
    tell_compiling(connection)
    connection.send(("ready",))
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            Trial(job, connection, guard).run()
        except (Exception, SystemExit, KeyboardInterrupt) as error:  # its file does not run here, say
            connection.send(("raised", what_raised(error)))
        connection.send(("end",))


def tell_compiling(connection: Connection) -> None:
    """Compiling takes seconds, and is no sign of a kernel that does not end."""
    event = importlib.import_module("numba.core.event")

    class Listener(event.Listener):  # type: ignore[name-defined]
        def on_start(self, event: Any) -> None:
            connection.send(("compiling", True))

        def on_end(self, event: Any) -> None:
            connection.send(("compiling", False))

    event.register("numba:compiler_lock", Listener())


class Trial:
    """A job at work."""

    def __init__(self, job: Job, connection: Connection, guard: Any) -> None:
        self.job, self.connection, self.guard = job, connection, guard
        self.op = OPS[job.op]
        self.all_ways_until = 0.0
        self.backend: Backend = backends.get(job.backend)

    def run(self) -> None:
        self.backend.set_num_threads(self.job.threads)
        with ExitStack() as stack:
            stack.enter_context(np.errstate(all="ignore"))
            stack.enter_context(self.backend.using(dict(load_kernels([f"{self.job.kernel}={self.op.name}"]))))
            stack.enter_context(self.backend.finely_split())
            if self.job.only is not None:
                self.called(*self.job.only)
                return
            trials: list[Callable[[], str]] = [self.repeatedly]
            trials += [partial(self.placed, n) for n, _ in enumerate(self.job.inputs)]
            for trial in trials:
                try:
                    problem = trial()
                except (Exception, SystemExit, KeyboardInterrupt) as error:  # another input may do worse
                    self.connection.send(("raised", what_raised(error)))
                else:
                    if problem:
                        self.connection.send(("problem", problem))

    def called(self, way: str, number: int) -> list[Any]:
        """The bits of the results on an input in one of the ways to place it, or to lay it out."""
        arrays, params = given(self.op, self.job.inputs[number], self.job.dtype)
        self.guard.place(at_start=way == "at the start", fill=OTHER_FILL if way == "other fill" else FILL)
        lay_out = LAYOUTS.get(way, np.copy)
        placed = [self.backend.asarray(lay_out(a) if a.ndim else a.copy()) for a in arrays]
        self.connection.send(("call", way, number, [self.backend.numpy(a).ctypes.data for a in placed]))
        start = time.perf_counter()
        try:
            return [bits(self.backend.numpy(r)) for r in outputs(self.backend.run(self.op, *placed, **params))]
        finally:
            self.connection.send(("took", time.perf_counter() - start))
            if self.job.only is not None:
                self.tell_bounds()

    def tell_bounds(self) -> None:
        from minibert.kernels.cpu.guard_bounds import refused_index

        if refused := refused_index():
            self.connection.send(("bounds", *refused))

    def repeatedly(self) -> str:
        """The same bits at each of many calls? Says at which they are others."""
        first = self.called("", self.job.repeated)  # which may compile it
        start = time.perf_counter()
        for n in range(2, REPEATS + 1):
            if time.perf_counter() - start > self.job.repeat_seconds:
                break
            if found := difference(self.op, first, self.called("", self.job.repeated)):
                return f"call {n} on the same input gave other bits than call 1: {found}"
        self.connection.send(("same", n))
        return ""

    def placed(self, number: int) -> str:
        """An input in every way. Says where the results depend on memory that nothing wrote."""
        if isinstance(self.job.inputs[number], Drawn):
            with suppress(Exception):  # which other checks tell where the formula has an answer
                if time.process_time() < self.all_ways_until:
                    return self.unwritten(number)
                self.called(("", "at the start")[number % 2], number)
            return ""
        for way in LAYOUTS:
            with suppress(Exception):  # which `strided_inputs` tells
                self.called(way, number)
        self.all_ways_until = time.process_time() + ALL_WAYS_SECONDS
        return self.unwritten(number)

    def unwritten(self, number: int) -> str:
        first = self.called("", number)
        self.called("at the start", number)
        found = difference(self.op, first, self.called("other fill", number))
        if found and (again := difference(self.op, first, self.called("", number))):
            return f"a second call on the same input gave other bits: {again}"
        return found and f"the result depends on memory that nothing wrote: where that holds other bytes, {found}"


def bits(result: Any) -> Any:
    """A result that stays as it is whatever happens to its memory."""
    return np.array(result) if isinstance(result, np.ndarray) else result


def difference(op: Op, first: Sequence[Any], second: Sequence[Any]) -> str:
    """The first element whose bits differ; empty where none do."""
    for k, (a, b) in enumerate(zip(first, second, strict=False)):
        if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)) or a.dtype != b.dtype or a.shape != b.shape:
            continue  # which other checks tell of
        other = np.flatnonzero((bytes_of(a) != bytes_of(b)).any(-1))
        if other.size:
            place = tuple(map(int, np.unravel_index(other[0], a.shape)))
            return f"{output_name(op, k)}[{', '.join(map(str, place))}] is {b[place]}, and was {a[place]}"
    return ""


def bytes_of(array: np.ndarray) -> np.ndarray:
    """An array's bytes, in a row for each element."""
    return np.frombuffer(array.tobytes(), np.uint8).reshape(array.size, array.dtype.itemsize)


if __name__ == "__main__":
    main()
