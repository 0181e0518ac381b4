"""How the Numba kernels are compiled, cached and spread over threads.

A kernel is a serial loop over the rows [start, stop), compiled by `jit` so that it releases the interpreter lock;
`run_rows` runs it on several ranges at once. (Numba's own `prange` compiles several times longer, leaves float
arithmetic in its bodies scalar and takes 130 to 180 microseconds to start.)
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numba
from numba.core import event

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be reordered and a * b + c fused; NaN and infinity keep their meaning, division stays division.
KERNEL_FLAGS = {"reassoc", "contract", "nsz"}
# A helper that splits a number into a high and a low part dies of reordering: x - n * high - n * low.
HELPER_FLAGS = {"contract"}
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
HELPER_OPTIONS: dict[str, Any] = {**OPTIONS, "fastmath": HELPER_FLAGS, "forceinline": True}

GRAIN_NANOSECONDS = 30_000  # work that outweighs waking a thread (10 to 40 us; two break even at 45 us of work in all)
PIECES_PER_THREAD = 4  # ranges handed out as threads come free: rows of unequal cost even out
CACHE_DAYS = 30  # compiled code of sources that no process has had for so long is removed


# --- compiling -------------------------------------------------------------------------------------------------------


def source_hash(root: Path) -> str:
    """A name for all Python sources under `root` and for the compiler: Numba sees no edit in an imported helper."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"\0{path.relative_to(root).as_posix()}\0{len(source)}\0".encode() + source)
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$MINIBERT_CACHE_DIR`, else `minibert` in the user's cache directory."""
    if named := os.environ.get("MINIBERT_CACHE_DIR"):
        base = Path(named)
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minibert"
    return base / f"kernels-{source_hash(Path(__file__).parent)}"


def _prepare_cache() -> Path | None:
    """Make this version's cache folder and remove those long unused; None, with a warning, where that cannot be."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
        os.utime(folder)
        for other in folder.parent.glob("kernels-" + "[0-9a-f]" * 16):
            with suppress(OSError):  # another process removes it too
                if time.time() - other.stat().st_mtime > CACHE_DAYS * 86400:
                    shutil.rmtree(other, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        warnings.warn(f"compiled kernels are not kept ({error}); set MINIBERT_CACHE_DIR to a folder", stacklevel=2)
        return None
    return folder


_cache = _prepare_cache()


def jit(function: Function) -> Function:
    """Compile a kernel, for each argument type when first called with it, and keep the code on disk.

    The kernel takes its arrays, then the range of rows (start, stop) that it is to do. Its innermost loop vectorises
    if it counts from 0: `for j in range(n)`. Where it would run over [start, stop), slice first: Numba lets indices be
    negative, and a test for that in the loop turns loads into gathers (12 times slower, measured on exp).

    A loop that sums stores nothing into another array: where the two lie close together, LLVM's test for overlap takes
    the scalar loop, which adds in another order, and the same call gives other bits from one time to the next.
    """
    cached = _cache is not None and Path(function.__code__.co_filename).is_file()
    function.__dict__["minibert_kernel"] = True  # so that `on_compile` tells it from other people's functions
    before = numba.config.CACHE_DIR
    try:
        if cached:
            numba.config.CACHE_DIR = str(_cache)  # read while decorating only
        return numba.njit(fastmath=KERNEL_FLAGS, cache=cached, **OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = before


def inline(function: Function) -> Function:
    """Compile a helper that kernels call: inlined by LLVM, so that the loop around it vectorises; never reordered."""
    return numba.njit(**HELPER_OPTIONS)(function)


def helper(function: Function) -> Function:
    """Compile a helper that has loops of its own: called, not copied into each kernel."""
    return numba.njit(**{**HELPER_OPTIONS, "forceinline": False})(function)


class Compilation(NamedTuple):
    """One kernel about to be compiled."""

    name: str  # "softmax_rows"
    dtype: str  # of its first float argument: "float32"; empty if it has none
    signature: str  # "array(float32, 2d, C), int64, int64"


class _CompileListener(event.Listener):
    """Times the outermost compilation of our kernels; Numba sends these under its compiler lock, one at a time."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[Compilation], None]] = []
        self.seconds = 0.0
        self.began: list[float] = []

    def on_start(self, event: Any) -> None:
        function, types = event.data["dispatcher"].py_func, event.data["args"]
        if hasattr(function, "minibert_kernel"):
            dtypes = [str(getattr(t, "dtype", t)) for t in types]
            dtype = next((d for d in dtypes if d.startswith("float")), "")
            self.began.append(time.perf_counter())
            for callback in list(self.callbacks):
                callback(Compilation(function.__name__, dtype, ", ".join(map(str, types))))

    def on_end(self, event: Any) -> None:
        if hasattr(event.data["dispatcher"].py_func, "minibert_kernel"):
            began = self.began.pop()
            if not self.began:
                self.seconds += time.perf_counter() - began


_listener = _CompileListener()
event.register("numba:compile", _listener)


@contextmanager
def on_compile(callback: Callable[[Compilation], None]) -> Iterator[None]:
    """Within the block, call `callback` before a kernel is compiled (not when it is loaded from disk)."""
    _listener.callbacks.append(callback)
    try:
        yield
    finally:
        _listener.callbacks.remove(callback)


def compile_seconds() -> float:
    """Seconds this process has spent compiling kernels."""
    return _listener.seconds


# --- threads ---------------------------------------------------------------------------------------------------------


class _State(threading.local):
    busy = False  # this thread is inside `run_rows`


_state = _State()
_lock = threading.Lock()
_threads: int | None = None
_pool: ThreadPoolExecutor | None = None
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
            _forget_pool()
        _threads = number


def _positive(value: Any, what: str) -> int:
    whole = value.isdecimal() if isinstance(value, str) else isinstance(value, int) and not isinstance(value, bool)
    if not whole or int(value) < 1:
        raise ValueError(f"{what} must be a whole number above 0, got {value!r}")
    return int(value)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _forget_pool() -> None:
    global _pool
    if _pool is not None:
        _pool.shutdown(wait=False)  # its threads finish what they have and end
    _pool = None


def _after_fork() -> None:
    """A child has none of its parent's threads, and may have been born while one of them held the lock."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()
    _state.busy = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_workers: dict[int, int] = {}  # native id of each thread of the pool -> the core it is kept off
_linux = sys.platform.startswith("linux")
_this_core: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None) if _linux else None


def _join(workers: dict[int, int]) -> None:
    workers[threading.get_native_id()] = -1


def _keep_workers_off_this_core() -> None:
    """Linux likes to wake a thread on the core of whoever wakes it, and may leave both there for milliseconds."""
    if _this_core is None:
        return
    here = _this_core()
    for worker, avoided in list(_workers.items()):
        if avoided != here:
            _workers[worker] = here
            others = os.sched_getaffinity(0) - {here}
            if others:
                with suppress(OSError):  # the thread has ended
                    os.sched_setaffinity(worker, others)


def _submit(work: Callable[[], None], count: int) -> list[Future[None]]:
    global _pool, _workers
    futures: list[Future[None]] = []
    with _lock:
        if _pool is None:
            _workers = {}  # a late thread of the pool before joins the dict before
            _pool = ThreadPoolExecutor(max(1, (_threads or 1) - 1), "minibert", _join, (_workers,))
        _keep_workers_off_this_core()
        with suppress(RuntimeError):  # no further thread starts (a limit, or the end): those there are do the work
            for _ in range(count):
                futures.append(_pool.submit(work))
    return futures


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

    Ranges hold at least `grain` rows (`rows_worth_a_thread`); what fits in one, or is called from within a kernel's
    thread, runs here and now. An exception in any range is raised when all threads have stopped.
    """
    if rows <= 0:
        return
    most = rows if _ignore_grain else rows // max(1, grain)
    threads = min(num_threads(), most)
    if threads <= 1 or _state.busy:
        kernel(*args, 0, rows)
        return
    pieces = min(most, PIECES_PER_THREAD * threads)
    queue = iter(range(pieces))  # shared: taking the next is one step under the interpreter lock

    def work() -> None:
        _state.busy = True
        try:
            for piece in queue:
                kernel(*args, rows * piece // pieces, rows * (piece + 1) // pieces)
        finally:
            _state.busy = False

    others = _submit(work, threads - 1)
    try:
        work()
    finally:  # a thread not yet awake finds nothing left to do: do not wait for it
        begun = [future for future in others if not future.cancel()]
        failures = [failure for future in begun if (failure := future.exception()) is not None]
    if failures:
        raise failures[0]
