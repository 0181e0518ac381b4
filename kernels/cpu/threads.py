"""How the rows of a kernel are spread over threads."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numba
import numpy as np
from numba import types

from minibert.kernels.cpu.team import Team

GRAIN_NANOSECONDS = 10_000  # work that outweighs handing some of it to another thread
PIECES_PER_THREAD = 4  # ranges handed out as threads come free: rows of unequal cost even out


_lock = threading.Lock()  # held while the team works
_threads: int | None = None
_team: Team | None = None
_ignore_grain = False


def num_threads() -> int:
    """Threads that kernels run on: `set_num_threads`, else `MINIBERT_NUM_THREADS`, else the cores of this process."""
    if _threads is None:
        text = os.environ.get("MINIBERT_NUM_THREADS", "").strip()
        set_num_threads(_positive(text, "MINIBERT_NUM_THREADS") if text else _cores())
    assert _threads is not None
    return _threads


def set_num_threads(count: int) -> None:
    """Run kernels on `count` threads from now on. Raises ValueError unless it is a whole number above 0."""
    global _threads
    number = _positive(count, "the number of threads")
    with _lock:
        if number != _threads:
            _forget_team()
        _threads = number


def _positive(value: Any, what: str) -> int:
    whole = value.isdecimal() if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)
    if not whole or int(value) < 1:
        raise ValueError(f"{what} must be a whole number above 0, got {value!r}")
    return int(value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forget_team() -> None:
    global _team, _cores_avoided
    if _team is not None:
        _team.end()
    _team, _cores_avoided = None, {}


def _after_fork() -> None:
    """A child has none of its parent's threads, and may have been born while one of them held the lock."""
    global _team, _lock, _cores_avoided
    if _team is not None:
        _team.close_pipe()
    _team, _lock, _cores_avoided = None, threading.Lock(), {}


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_cores_avoided: dict[int, int] = {}  # native id of a member -> the core it is kept off
_linux = sys.platform.startswith("linux")
_this_core: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None) if _linux else None


def _keep_members_off_this_core(team: Team) -> None:
    """Linux likes to wake a thread on the core of whoever wakes it, and may leave both there for milliseconds."""
    if _this_core is None:
        return
    here = _this_core()
    for member in team.identities:
        if _cores_avoided.get(member) != here:
            _cores_avoided[member] = here
            others = os.sched_getaffinity(0) - {here}
            if others:
                with suppress(OSError):  # the thread has ended
                    os.sched_setaffinity(member, others)


def rows_worth_a_thread(elements: int, cost: float = 0.4) -> int:
    """The `grain` for rows of so many elements, each `cost` nanoseconds of work.

    One core, float32: add 0.1, exp 0.2 to 0.3, softmax 0.4, erf 0.35 to 0.7, Philox 0.3 to 0.7; float64 exp 3, erf 12.
    """
    return max(1, round(GRAIN_NANOSECONDS / (max(1, elements) * cost)))


def blocks(rows: int, size: int) -> int:
    """How many blocks of `size` rows cover `rows`.

    A sum over rows that is kept per thread changes with their number. So such a kernel runs over blocks instead,
    `run_rows(kernel, blocks(rows, size), *args)`: each block has a partial sum of its own, added up in order after.
    """
    return -(-rows // size)


@contextmanager
def finely_split() -> Iterator[None]:
    """Within the block every row is worth a thread: so that a check on few rows sees what happens between ranges."""
    global _ignore_grain
    before, _ignore_grain = _ignore_grain, True
    try:
        yield
    finally:
        _ignore_grain = before


def run_rows(kernel: Callable[..., Any], rows: int, *args: Any, grain: int = 1) -> None:
    """Call `kernel(*args, start, stop)` on ranges that cover [0, rows), on `num_threads()` threads.

    Ranges hold at least `grain` rows (`rows_worth_a_thread`); what fits in one, or comes while the threads are at work
    for another caller, runs here and now. A kernel that `jit` did not compile gets the same ranges, one after the
    other. An exception in any range is raised when all threads have stopped.
    """
    if rows <= 0:
        return
    most = rows if _ignore_grain else rows // max(1, grain)
    threads = min(num_threads(), most)
    if threads <= 1:
        kernel(*args, 0, rows)
        return
    pieces = min(most, PIECES_PER_THREAD * threads)
    failed = None
    if hasattr(kernel, "overloads") and _lock.acquire(blocking=False):
        try:
            failed = _run_on_team(kernel, rows, pieces, args)
        finally:
            _lock.release()
        if failed is None:
            return
    # an exception in compiled code leaves its piece's number only: that piece again raises it here
    for piece in range(pieces) if failed is None else (failed,):
        kernel(*args, rows * piece // pieces, rows * (piece + 1) // pieces)
    if failed is not None:
        raise RuntimeError(f"{kernel.__name__} failed on one of its ranges, and not when that was tried again")


def _run_on_team(kernel: Any, rows: int, pieces: int, args: tuple[Any, ...]) -> int | None:
    global _team
    if _team is None:
        _team = Team((_threads or 1) - 1)
    _keep_members_off_this_core(_team)
    return _team.run(_address(kernel, args), args, rows, pieces)


_addresses: dict[tuple[Any, ...], int] = {}


def _address(kernel: Any, args: tuple[Any, ...]) -> int:
    """Where the code of `kernel` for arguments of these types begins. Raises TypeError if it returns something."""
    key = (kernel, *map(_kind, args))
    address = _addresses.get(key)
    if address is None:
        kinds = (*map(numba.typeof, args), types.intp, types.intp)
        kernel.compile(kinds)
        compiled = kernel.overloads[kinds]
        if compiled.signature.return_type != types.none:
            raise TypeError(f"a kernel returns nothing, and {kernel.__name__} returns {compiled.signature.return_type}")
        address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
        _addresses[key] = address
    return address


def _kind(value: Any) -> Any:
    """Values of one kind have one type of Numba's."""
    if type(value) is np.ndarray:
        return value.dtype.num, value.ndim, value.flags.num
    if isinstance(value, tuple):
        return type(value), *map(_kind, value)
    if type(value) is int:
        return int if value < 1 << 63 else "uint64"
    return type(value)
