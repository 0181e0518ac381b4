"""Where ops run: NumPy, Numba on the CPU's cores, and whatever other packages add."""

if __name__ != "minibert.backends":
    raise ImportError("this folder is the package `minibert.backends`: import it by that name")

import os

# A BLAS thread that spins after its product keeps a core from the kernels; OpenBLAS reads this when it is loaded.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NamedTuple

from minibert.backends import blas
from minibert.backends.base import Backend, BackendUnavailable
from minibert.backends.blas import deterministic
from minibert.backends.own import own_backend
from minibert.errors import UserError, pip_install

__all__ = [
    "MOST_THREADS", "Backend", "BackendUnavailable", "Status", "available", "determinism", "deterministic", "get",
    "names", "set_deterministic", "set_num_threads", "spec_of", "usual",
]  # fmt: skip

GROUP = "minibert.backends"
BUILT_IN = {
    "numpy": "minibert.backends.numpy_backend",
    "numba": "minibert.backends.numba_backend",
    "cupy": "minibert.backends.cuda.cupy_backend",
    "emulator": "minibert.backends.emulator.backend",
}
REMEDY = {"numba": pip_install("numba", "scipy")}
THREADS = "MINIBERT_NUM_THREADS"
MOST_THREADS = 1024  # more is a slip of the keyboard


class Status(NamedTuple):
    """Whether a backend runs here: the backend, or the reason and remedy."""

    name: str
    backend: Backend | None
    reason: str


_loaded: dict[str, Backend] = {}


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """Every backend known here, the reference first; built-in ones, then those of other packages."""
    return [*BUILT_IN, *(name for name in _third_party() if name not in BUILT_IN)]


def get(name: str) -> Backend:
    """The backend called `name`, or one of your own by FILE.py:NAME or package.module:NAME.

    Its library is imported here, on first use, and nowhere else. One of your own is known by its own name from then on.

    Raises UserError for a name that is not known and BackendUnavailable where it cannot run.
    """
    key = _absolute(name)
    if key not in _loaded:
        found = _load(key)
        if os.environ.get(THREADS, "").strip():
            found.set_num_threads(_threads(os.environ[THREADS], f"${THREADS}"))
        _loaded[key] = found
        if ":" in key:
            _loaded[found.name] = found
    return _loaded[key]


def spec_of(backend: Backend) -> str:
    """What `get` gives this backend for, in any process and folder: its name, or where it is defined."""
    specs = [key for key, one in _loaded.items() if one is backend and ":" in key]
    return specs[0] if specs else backend.name


def _absolute(name: str) -> str:
    file, colon, attribute = name.rpartition(":")
    return f"{Path(file).resolve()}:{attribute}" if colon and file.endswith(".py") else name


def _load(name: str) -> Backend:
    if ":" in name:
        own = own_backend(name)
        if own.name in names():
            raise UserError(f"backend {name} calls itself {own.name!r}, as another does: give it a name of its own")
        return own
    if name not in names():
        raise UserError(
            f"no backend is called {name!r}: choose one of {', '.join(names())}, or name your own as FILE.py:NAME"
        )
    try:
        found = import_module(BUILT_IN[name]).backend if name in BUILT_IN else _third_party()[name].load()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"backend {name!r} cannot run here: {error}") from error
    except Exception as error:  # whatever the import of another package does: the other backends still run
        remedy = REMEDY.get(name, f"install what the package behind it needs ({error})")
        raise BackendUnavailable(f"backend {name!r} cannot run here: {error}; to mend it: {remedy}") from error
    if not isinstance(found, Backend):
        raise BackendUnavailable(
            f"backend {name!r}: its entry point gave {type(found).__name__}, expected a minibert Backend"
        )
    return found


def available() -> list[Status]:
    """Every known backend, with the reason where it does not run here."""
    found = []
    for name in names():
        try:
            found.append(Status(name, get(name), ""))
        except BackendUnavailable as error:
            found.append(Status(name, None, str(error)))
    return found


def usual() -> list[Backend]:
    """Every backend that runs here, but for those that only play one, which must be named."""
    found = [status.backend for status in available() if status.backend is not None]
    return [backend for backend in found if not backend.emulated]


def _threads(value: object, source: str) -> int:
    text = str(value).strip()
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        raise UserError(f"{source}: expected a number of threads from 1 to {MOST_THREADS}, got {value!r}")
    return int(text)


def set_num_threads(count: int) -> None:
    """Use `count` threads in every backend loaded from here on, and in those already loaded."""
    os.environ[THREADS] = str(_threads(count, "threads"))
    for backend in _loaded.values():
        backend.set_num_threads(count)


def set_deterministic(on: bool) -> None:
    """Make the results of the CPU's backends bit-identical over runs and numbers of threads; or let them vary again.

    It holds for the process, as its BLAS does: on `numpy` products run on one thread (those of `numba` are its own, and
    have the same bits either way). Raises BackendUnavailable where NumPy's BLAS cannot be held to one thread.
    """
    if on and blas.blas_threads() is None:
        raise BackendUnavailable(
            "the deterministic mode needs the OpenBLAS of NumPy's wheel, whose threads can be set, and this NumPy has "
            f"another BLAS: {pip_install('--force-reinstall', 'numpy')}"
        )
    blas.set_deterministic(on)


@contextmanager
def determinism(on: bool = True) -> Iterator[None]:
    """Within the block, the deterministic mode is on (or off). Raises BackendUnavailable as `set_deterministic`."""
    before = deterministic()
    set_deterministic(on)
    try:
        yield
    finally:
        set_deterministic(before)
