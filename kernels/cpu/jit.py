"""How the Numba kernels are compiled, and where the code is kept.

A kernel is a serial loop over the rows [start, stop), compiled by `jit` so that it releases the interpreter lock;
`threads.run_rows` runs it on several ranges at once. (Numba's own `prange` compiles several times longer, leaves
float arithmetic in its bodies scalar and takes 130 to 180 microseconds to start.)
"""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import llvmlite
import numba
from llvmlite.binding import Linkage
from numba import types
from numba.core import caching, event
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

from minibert.kernels.cache import cache_base, own_folder, read_sealed, sealed
from minibert.kernels.cpu.tiles import PERMITTED
from minibert.kernels.cpu.vectors import VECTOR_BYTES

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be reordered and a * b + c fused; NaN and infinity keep their meaning, division stays division.
KERNEL_FLAGS = {"reassoc", "contract", "nsz"}
# A helper that splits a number into a high and a low part dies of reordering: x - n * high - n * low.
HELPER_FLAGS = {"contract"}
OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
HELPER_OPTIONS: dict[str, Any] = {**OPTIONS, "fastmath": HELPER_FLAGS, "forceinline": True}

# What Numba's environment variables decide of the code, and Numba forgets when it looks for code of the same kind.
CODE_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")
KERNELS = Path(__file__).resolve().parents[1]
WIDTH = f'"prefer-vector-width"="{8 * VECTOR_BYTES}"'
CACHE_DAYS = 30  # compiled code of sources that no process has had for so long is removed


def source_hash(root: Path) -> str:
    """A name for all Python sources under `root` and for the compiler: Numba sees no edit in an imported helper.

    And for whether tiles may be used: code that has them ends a process that may not.
    """
    settings = (getattr(numba.config, name, None) for name in CODE_SETTINGS)
    compiler = [numba.__version__, llvmlite.__version__, PERMITTED, *settings]
    digest = hashlib.sha256(repr(compiler).encode())
    for path in sorted(root.rglob("*.py")):
        source = path.read_bytes()
        digest.update(f"\0{path.relative_to(root).as_posix()}\0{len(source)}\0".encode() + source)
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled kernels of these sources are kept."""
    return cache_base() / f"kernels-{source_hash(KERNELS)}"


def _prepare_cache() -> Path | None:
    """Make this version's cache folder and remove those long unused; None, with a warning, where that cannot be."""
    try:
        folder = own_folder(cache_folder())
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


class _SealedFiles(caching.IndexDataCacheFile):
    """Numba's files of one kernel, each behind its SHA-256: one that is damaged is compiled anew, not run."""

    def _load_index(self) -> Any:
        try:
            stamp, overloads = pickle.loads(read_sealed(Path(self._index_path)))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"a compiled kernel is made anew: {error}", stacklevel=2)
            return {}
        return overloads if stamp == self._source_stamp else {}

    def _save_index(self, overloads: Any) -> None:
        with self._open_for_write(self._index_path) as file:
            file.write(sealed(self._dump((self._source_stamp, overloads))))

    def _load_data(self, name: str) -> Any:
        try:
            return pickle.loads(read_sealed(Path(self._data_path(name))))
        except ValueError as error:
            warnings.warn(f"a compiled kernel is made anew: {error}", stacklevel=2)
            return None

    def _save_data(self, name: str, data: Any) -> None:
        with self._open_for_write(self._data_path(name)) as file:
            file.write(sealed(self._dump(data)))

    def save(self, key: Any, data: Any) -> None:
        try:
            super().save(key, data)
        except OSError as error:  # a full disk or quota: the code is there, and runs
            warnings.warn(f"a compiled kernel is not kept ({error}); set MINIBERT_CACHE_DIR to a folder", stacklevel=2)


@contextmanager
def _our_cache(function: Callable[..., Any]) -> Iterator[bool]:
    """Numba reads the folder while decorating, and only then. Yields whether the code of `function` can be kept."""
    before = numba.config.CACHE_DIR, caching.IndexDataCacheFile
    cached = _cache is not None and Path(function.__code__.co_filename).is_file()
    try:
        if cached:
            numba.config.CACHE_DIR, caching.IndexDataCacheFile = str(_cache), _SealedFiles
        yield cached
    finally:
        numba.config.CACHE_DIR, caching.IndexDataCacheFile = before


class _OwnCode(JITCodeLibrary):
    """The code of a kernel together with all that it calls, of which nothing but the kernel has a name outside.

    Numba puts the functions that a kernel calls into its code as weak symbols: of all copies that a process holds, each
    caller runs the one that was loaded first. But each copy was compiled among other neighbours, and rounds in its own
    way: so the bits of a kernel would depend on what was loaded before it, and on whether it was compiled or loaded.

    LLVM takes half of the widest vectors on processors that once slowed down for them; these loops gain by the whole.
    """

    def add_ir_module(self, ir_module: Any) -> None:
        for function in ir_module.functions:
            if not function.is_declaration:
                set.add(function.attributes, WIDTH)  # the set's own: llvmlite's knows no attribute that has a value
        super().add_ir_module(ir_module)

    def _finalize_final_module(self) -> None:
        self._finalized = True  # all but for the engine, as the next line wants it
        self._get_module_for_linking()  # keeps a copy, with names, for the kernels that call this one
        for function in self._final_module.functions:
            if function.linkage is Linkage.linkonce_odr:
                function.linkage = Linkage.private  # an internal one could still be found by its name
        super()._finalize_final_module()


class _Pipeline(Compiler):
    """Numba's compiler, with the result in `_OwnCode`."""

    def define_pipelines(self) -> Any:
        self.state.library = _OwnCode(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        self.state.library.enable_object_caching()
        return super().define_pipelines()


def jit(function: Function, *, announced: bool = True) -> Function:
    """Compile a kernel, for each argument type when first called with it, and keep the code on disk.

    The kernel takes its arrays, then the range of rows (start, stop) that it is to do. Its innermost loop vectorises
    if it counts from 0: `for j in range(n)`. Where it would run over [start, stop), slice first: Numba lets indices be
    negative, and a test for that in the loop turns loads into gathers (12 times slower, measured on exp).

    A loop has two versions where it reads one array and stores into another: on vectors, and one by one for arrays that
    lie so close together that they may overlap. Both must round alike, or the same call gives other bits from one time
    to the next (tests/kernels/test_overlap.py). So a loop that sums stores nothing into another array: the order would
    differ. And of products that are added, the factors are chosen, not the product: `(x if keep else 0) * s + r` is one
    fused operation in both versions, `(x * s if keep else 0) + r` in one of them. What LLVM reorders in one version
    alone goes into an `inline` helper.

    It may call other kernels: their code is compiled into its own, and no other copy of them runs in their place.

    What is not `announced` is compiled without a word to `on_compile`.
    """
    with _our_cache(function) as cached:
        function.__dict__["minibert_kernel"] = announced  # so that the listener tells it from other people's functions
        return _without_literals(
            numba.njit(fastmath=KERNEL_FLAGS, cache=cached, pipeline_class=_Pipeline, **OPTIONS)(function)
        )


def _without_literals(kernel: Any) -> Any:
    """A call from another kernel does not compile this one, and all that it calls, anew for each constant it passes."""
    template = kernel.get_call_template
    kernel.get_call_template = lambda args, kws: template(
        [types.unliteral(kind) for kind in args], {name: types.unliteral(kind) for name, kind in kws.items()}
    )
    return kernel


def address_for_c(function: Callable[..., int], arguments: int) -> int:
    """The address of a function of so many 64-bit integers that returns one, compiled for callers by address."""
    with _our_cache(function) as cached:
        compiled = numba.cfunc(types.int64(*(types.int64,) * arguments), cache=cached, pipeline_class=_Pipeline)(
            function
        )
    return int(compiled.address)


def inline(function: Function) -> Function:
    """Compile a helper that kernels call: inlined by LLVM, so that the loop around it vectorises; never reordered."""
    return numba.njit(**HELPER_OPTIONS)(function)


def inline_unfused(function: Function) -> Function:
    """`inline`, where each operation rounds by itself: what has to be the same bits on every machine."""
    return numba.njit(**{**HELPER_OPTIONS, "fastmath": False})(function)


def helper(function: Function) -> Function:
    """Compile a helper that has loops of its own: called by each kernel, not inlined into it; never reordered."""
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
        function, kinds = event.data["dispatcher"].py_func, event.data["args"]
        if hasattr(function, "minibert_kernel"):
            dtypes = [str(getattr(t, "dtype", t)) for t in kinds]
            dtype = next((d for d in dtypes if d.startswith("float")), "")
            self.began.append(time.perf_counter())
            for callback in list(self.callbacks) if function.minibert_kernel else ():
                callback(Compilation(function.__name__, dtype, ", ".join(map(str, kinds))))

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
