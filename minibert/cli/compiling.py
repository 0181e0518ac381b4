"""Kernels are compiled when first called, which takes seconds: say so, rather than seem to hang."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from minibert.cli.options import notes


@contextmanager
def show_compiling(show: Callable[[str], Any] | None = None) -> Iterator[None]:
    """Within the block, say which kernel is being compiled, and at the end how many were and how long it took.

    `show` takes each text, as `update` of a rich status does; without it the text changes in place on a terminal. Where
    there is no terminal, a line is printed at the first kernel. Nothing is shown where all kernels come from disk, or
    where Numba is not installed.
    """
    try:
        from minibert.kernels.cpu.jit import Compilation, compile_seconds, on_compile
    except ImportError:
        yield
        return
    began, count = compile_seconds(), 0
    status = notes.status("") if show is None and notes.is_terminal else None

    def compiling(kernel: Compilation) -> None:
        nonlocal count
        count += 1
        text = f"compiling kernel {count} for this CPU: {kernel.name} {kernel.dtype}"
        if show is not None:
            show(text)
        if status is not None:
            status.update(text)
            status.start()
        if count == 1 and not notes.is_terminal:
            notes.print("compiling kernels for this CPU; the next run will find them on disk ...", highlight=False)

    try:
        with on_compile(compiling):
            yield
    finally:
        if status is not None:
            status.stop()
        if count:
            notes.print(f"compiled {count} kernels in {compile_seconds() - began:.1f} s", highlight=False)
