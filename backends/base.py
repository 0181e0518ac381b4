"""A backend: the one door through which every operation of the model passes."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, Protocol

import numpy as np

from minibert.backends.blas import blas_threads, set_blas_threads
from minibert.errors import UserError, pip_install
from minibert.kernels.adjoining import adjoining
from minibert.kernels.op import Array, Op, holds_floats, outputs
from minibert.kernels.readings import cost

Kernel = Callable[..., Any]
NARROW = ("float16", "bfloat16")  # arithmetic is in float32, and what an op calls wide is stored in it too


class BackendUnavailable(RuntimeError):
    """This backend cannot run here; the message says why and what would mend it."""


def dtype_of(name: str) -> np.dtype[Any]:
    """NumPy's dtype of that name; bfloat16 is ml_dtypes'. Raises BackendUnavailable where that is not installed."""
    if name == "bfloat16":
        try:
            import_module("ml_dtypes")  # tells NumPy of it
        except ImportError:
            raise BackendUnavailable(f"bfloat16 arrays need ml_dtypes: {pip_install('ml_dtypes')}") from None
    return np.dtype(name)


@cache
def _takes_places(kernel: Kernel | None) -> bool:
    """Whether a kernel can write its outputs where it is told."""
    try:
        return kernel is not None and "into" in signature(kernel).parameters
    except ValueError:  # a callable that says nothing of its parameters
        return False


def storage_of(op: Op, arrays: Sequence[Array]) -> np.dtype[Any] | None:
    """The dtype in which a call keeps its floats: that of the first which op does not call wide; None without one."""
    floats = (a.dtype for i, a in enumerate(arrays) if holds_floats(a) and i not in op.wide_inputs)
    return next(floats, None)


@cache
def _computes(op: Op) -> bool:
    """Whether its formula does arithmetic; else it moves elements, whatever they are."""
    sample = next(iter(op.samples(np.random.default_rng(0))))
    return cost(op, *sample.arrays, **sample.params).flops > 0


def with_integers(op: Op, result: Any) -> Any:
    """What a formula gave, its whole numbers in the dtype that arrays hold them in."""
    if not op.whole_outputs:
        return result
    made = tuple(x.astype(op.whole_outputs.get(k, x.dtype)) for k, x in enumerate(outputs(result)))
    return made if isinstance(result, tuple) else made[0]


class Watcher(Protocol):
    """Stands in the door: sees one call, makes it by `call()`, and returns its result."""

    def __call__(
        self, op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]
    ) -> Any: ...


class Backend:
    """Arrays of one library, and the kernels written for it.

    `kernel_files` names the module of each op family that holds its kernels ("cpu": `kernels/softmax/cpu.py`); a
    function there that bears an op's name is that op's kernel. An op without one runs by its formula on `xp`.
    """

    dtypes: tuple[str, ...] = ("float32", "float64")  # that its arrays may hold, the usual one first
    product_modes: tuple[str, ...] = ("float32",)  # how products of float32 may be computed
    product_mode = "float32"  # one of these
    emulated = False  # it plays another machine: its times are not that machine's, and commands run it only if named

    def __init__(self, name: str, xp: Any, kernel_files: str | None = None) -> None:
        self.name = name
        self.xp = xp
        self.kernel_files = kernel_files
        self._kernels: dict[Op, Kernel | None] = {}
        self.swapped: frozenset[Op] = frozenset()  # ops whose kernels are swapped for others, see `using`
        self._watchers: list[Watcher] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle names the backend, and is loaded where one of that name is."""
        backends = import_module("minibert.backends")
        return backends.get, (backends.spec_of(self),)

    def __deepcopy__(self, memo: Any) -> Backend:
        return self  # what stands on it is copied, the machine is not

    def run(self, op: Op, *arrays: Array, into: Sequence[Array | None] = (), **params: Any) -> Any:
        """Run `op` here: by this backend's kernel, else by the formula. One array, or (output, *residuals).

        `into` has a place for some of the outputs, or None: a kernel with a keyword of that name writes there, what
        others give is copied there. It holds nothing that the op reads.
        """
        run = self._run_into if into else self._run
        call: Callable[[], Any] = lambda: run(op, arrays, params, *into)  # noqa: E731
        for watcher in self._watchers:
            call = self._watched(watcher, op, arrays, params, call)
        return call()

    def _run(self, op: Op, arrays: tuple[Array, ...], params: dict[str, Any]) -> Any:
        kernel = self.kernel(op)
        if any([a.dtype.itemsize == 2 for a in arrays]):
            storage = storage_of(op, arrays)
            if storage is not None and storage.name in NARROW and not self._takes(op, kernel, storage):
                return self._run_widened(op, arrays, params, storage)
        if kernel is not None:
            result = kernel(*arrays, **params)
        else:
            result = with_integers(op, op.formula(self.xp, *arrays, **params))
            for written, value in zip(op.writes, outputs(result), strict=False):
                arrays[written][...] = value
        if op.writes:
            return tuple(arrays[i] for i in op.writes)
        asarray = self.xp.asarray
        return tuple(map(asarray, result)) if isinstance(result, tuple) else asarray(result)

    @staticmethod
    def _takes(op: Op, kernel: Kernel | None, storage: np.dtype[Any]) -> bool:
        """Whether what runs the op here works on arrays in 16 bits themselves."""
        if kernel is None:
            return not _computes(op)
        return storage.name == "bfloat16" and getattr(kernel, "takes_bfloat16", False)

    def _run_widened(self, op: Op, arrays: tuple[Array, ...], params: dict[str, Any], storage: np.dtype[Any]) -> Any:
        """On copies in float32: 16 bits are for memory. What the op does not call wide is stored in them again."""
        wide = tuple(self.widened(a) if a.dtype == storage else a for a in arrays)
        result = self._run(op, wide, {name: value for name, value in params.items() if name != "into"})
        if op.writes:
            for written in op.writes:
                if arrays[written] is not wide[written]:
                    arrays[written][...] = self.narrowed(wide[written], storage)
            return tuple(arrays[i] for i in op.writes)
        stored = tuple(
            r if not holds_floats(r) or k in op.wide_outputs or k in op.whole_outputs else self.narrowed(r, storage)
            for k, r in enumerate(outputs(result))
        )
        return stored if isinstance(result, tuple) else stored[0]

    def widened(self, x: Array) -> Array:
        """A copy in float32 of an array in 16 bits."""
        return x.astype(np.float32)

    def narrowed(self, x: Array, dtype: np.dtype[Any]) -> Array:
        """A copy in 16 bits, rounded, of an array in float32."""
        return x.astype(dtype)

    def _run_into(self, op: Op, arrays: tuple[Array, ...], params: dict[str, Any], *into: Array | None) -> Any:
        given = {**params, "into": into} if _takes_places(self.kernel(op)) else params
        results = list(outputs(self._run(op, arrays, given)))
        for i, place in enumerate(into):
            if place is not None and results[i] is not place:
                place[...] = results[i]
                results[i] = place
        return tuple(results) if len(results) > 1 else results[0]

    @staticmethod
    def _watched(
        watcher: Watcher, op: Op, arrays: tuple[Array, ...], params: dict[str, Any], call: Callable[[], Any]
    ) -> Callable[[], Any]:
        return lambda: watcher(op, arrays, params, call)

    def kernel(self, op: Op) -> Kernel | None:
        """The kernel of `op` here, or None where its formula runs."""
        if op not in self._kernels:
            self._kernels[op] = self._find(op)
        return self._kernels[op]

    def _find(self, op: Op) -> Kernel | None:
        try:
            if self.kernel_files is None or find_spec(f"{op.family}.{self.kernel_files}") is None:
                return None
        except ModuleNotFoundError:  # defined in a module that is no package, such as a script
            return None
        module = import_module(f"{op.family}.{self.kernel_files}")
        kernel = getattr(module, op.name, None)
        # a helper that the module imported may bear an op's name: cpu_math.tanh is not the kernel of tanh
        return kernel if getattr(kernel, "__module__", None) == module.__name__ else None

    def by(self, op: Op) -> str:
        """What runs `op` here: "kernel" (written by hand), "library" (BLAS, NumPy's own loop) or "formula"."""
        kernel = self.kernel(op)
        return "formula" if kernel is None else getattr(kernel, "by", "kernel")

    @contextmanager
    def using(self, kernels: Mapping[Op, Kernel | None]) -> Iterator[Backend]:
        """Swap kernels in for the length of a `with` block (None: run the formula)."""
        for op in kernels:
            if not isinstance(op, Op):
                raise TypeError(f"using: expected an op, such as OPS['softmax'], got {op!r}")
        before = self._kernels, self.swapped
        self._kernels, self.swapped = {**self._kernels, **kernels}, self.swapped | kernels.keys()
        try:
            yield self
        finally:
            self._kernels, self.swapped = before

    @contextmanager
    def watched_by(self, watcher: Watcher) -> Iterator[Backend]:
        """Let `watcher` see every call for the length of a `with` block."""
        self._watchers.append(watcher)
        try:
            yield self
        finally:
            self._watchers.remove(watcher)

    @contextmanager
    def unwatched(self) -> Iterator[Backend]:
        """Let no watcher see the calls of a `with` block: those that a watcher makes itself, say."""
        before, self._watchers = self._watchers, []
        try:
            yield self
        finally:
            self._watchers = before

    def require_dtype(self, dtype: str, option: str = "--dtype") -> None:
        """Raise UserError unless arrays here may hold `dtype`, BackendUnavailable where NumPy lacks what knows it.

        `option`: as what it was given, for the message.
        """
        if dtype not in self.dtypes:
            raise UserError(f"{option}: backend {self.name} has arrays of {', '.join(self.dtypes)}: not {dtype!r}")
        dtype_of(dtype)

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        return self.xp.asarray(x, dtype=dtype)

    def adjoining(self, arrays: Sequence[Array | None]) -> Array | None:
        """One array over arrays that lie in memory one after the other, joined along their first axis, else None."""
        return adjoining(arrays)

    def numpy(self, x: Array) -> np.ndarray:
        """A copy, or on a CPU the array itself, as NumPy."""
        return np.asarray(x)

    def prepacked(self, weight: Array) -> Array:
        """A weight (out, in) that is read again and again with the values that it has now, as kernels like it best.

        It is the same array to whoever looks: a backend may keep something beside it.
        """
        return weight

    def upload_ahead(self, arrays: Sequence[np.ndarray]) -> None:
        """Begin to bring here what `asarray` will be asked for next: these very arrays. Nothing to do in one memory."""

    def synchronize(self) -> None:
        """Wait until all that was launched has run."""

    def release_memory(self) -> None:
        """Give back what has been freed, where this backend keeps it: after a model was made, before the first step."""

    def device_memory(self) -> int | None:
        """Bytes that arrays may take in all, those that are there among them; None where they lie in the host's."""
        return None

    @contextmanager
    def peak_memory(self) -> Iterator[Callable[[], int]]:
        """Measure within the block; the function it yields gives the peak, in bytes, above what was there before."""
        outer = tracemalloc.is_tracing()
        if not outer:
            tracemalloc.start()
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        peak = 0
        try:
            yield lambda: peak or tracemalloc.get_traced_memory()[1] - before
        finally:
            peak = tracemalloc.get_traced_memory()[1] - before
            if not outer:
                tracemalloc.stop()

    @contextmanager
    def live_memory(self) -> Iterator[Callable[[], int]]:
        """Follow memory within the block; the function it yields gives the live bytes above what was there before."""
        outer = tracemalloc.is_tracing()
        if not outer:
            tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        try:
            yield lambda: tracemalloc.get_traced_memory()[0] - before
        finally:
            if not outer:
                tracemalloc.stop()

    def finely_split(self) -> AbstractContextManager[None]:
        """A block in which kernels divide even the least work among threads: for checks of what happens in between."""
        return nullcontext()

    def orders(self) -> Iterator[tuple[str, AbstractContextManager[Any]]]:
        """Ways to divide and order the work of a kernel that must not change a bit of what it gives, with their names.

        Each is a block in which work is done that way; here, by one, two and three threads.
        """
        for threads in (1, 2, 3):
            yield f"{threads} thread{'s'[: threads > 1]}", self._divided_among(threads)

    @contextmanager
    def _divided_among(self, threads: int) -> Iterator[None]:
        before, blas = self.num_threads(), blas_threads()
        try:
            self.set_num_threads(threads)
            set_blas_threads(1)  # whose bits depend on its threads
            with self.finely_split():
                yield
        finally:
            self.set_num_threads(before)
            if blas:
                set_blas_threads(blas)

    def describe(self) -> str:
        """Library, version and threads, for a table."""
        return self.name

    def num_threads(self) -> int:
        """How many threads an op may use here."""
        return 1

    def set_num_threads(self, count: int) -> None:
        """Use `count` threads; a backend without threads of its own has nothing to set."""

    def __repr__(self) -> str:
        return f"<backend {self.name}>"
