"""A piece of work recorded once and queued again in one call: a CUDA graph, with the numbers that change each time.

Addresses, sizes and launches are those of the recording. What differs from one replay to the next is uploaded: arrays
that came from the host, what the host derives from them, and numbers (a step, a learning rate).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from minibert.backends.cuda.array import DeviceArray
from minibert.backends.cuda.pool import GraphPool


class LiveInt(int):
    """A whole number that a captured graph reads anew at each replay; everywhere else it is the one of its making.

    `array` holds it on the device, as uint32.
    """

    current: int
    array: DeviceArray

    @property
    def address(self) -> int:
        return self.array.address


class LiveFloat(float):
    """The same for a float that the host computes with: a learning rate."""

    current: float


class Upload(NamedTuple):
    buffer: np.ndarray  # what the graph reads at each replay
    dtype: np.dtype[Any]  # of what is in it
    given: np.ndarray  # the array as the caller had it: how a replay finds the new one
    host: np.ndarray | None  # the copy that the device array remembers


class Derived(NamedTuple):
    buffer: np.ndarray
    compute: Callable[..., np.ndarray]
    sources: tuple[Any, ...]  # an Upload, or a number


Staged = list[tuple[np.ndarray, np.ndarray]]  # a buffer that the graph reads, and what is to be in it


class Capture:
    """What was queued within `with backend.capturing() as capture:`, to be replayed.

    Arrays that it made and that are still held hold the results of the last replay, until another graph is replayed.
    """

    def __init__(self, backend: Any, pool: GraphPool) -> None:
        self.backend, self.pool = backend, pool
        pool.graphs += 1
        self.graph: Any = None
        self._replayed: Any = None  # the event after the last replay
        self._uploads: list[Upload] = []
        self._derived: list[Derived] = []
        self._inputs: list[tuple[Upload, str]] = []

    def __del__(self) -> None:
        with suppress(Exception):  # what went wrong in a kernel is told to whoever waits next
            self._wait()  # it reads page-locked memory that goes with it
        self.pool.leave()

    def uploaded(self, buffer: np.ndarray, dtype: np.dtype[Any], given: Any, host: np.ndarray | None) -> None:
        """The graph reads `buffer`, elements of `dtype`, where `given` was uploaded."""
        self._uploads.append(Upload(buffer, dtype, np.asarray(given), host))

    def derived(self, compute: Callable[..., np.ndarray], sources: Sequence[Any]) -> DeviceArray:
        """compute(*sources) on the device, computed again at each replay; sources are uploaded arrays, or numbers."""
        found = tuple(self._upload_of(s) if isinstance(s, DeviceArray) else s for s in sources)
        values = compute(*map(_value, found))
        made = self.backend.empty(values.shape, values.dtype)
        buffer = self.backend.driver.host_buffer(max(1, values.nbytes))[: values.nbytes]
        buffer[...] = values.reshape(-1).view(np.uint8)
        if buffer.size:
            self.backend.driver.upload(buffer, made.address)
        self._derived.append(Derived(buffer, compute, found))
        return made

    def _upload_of(self, array: DeviceArray) -> Upload:
        for upload in self._uploads:
            if upload.host is not None and array.host is not None and _same_memory(upload.host, array.host):
                return upload
        raise ValueError("a graph derives numbers from arrays that were uploaded within it; this one was not")

    def bind(self, inputs: Mapping[str, Any]) -> None:
        """Say which uploads are inputs, by name, so that a replay can give new ones.

        Raises ValueError for integers that were uploaded and are no input: each replay would use the old ones.
        """
        for upload in self._uploads:
            names = [name for name, value in inputs.items() if _same_memory(upload.given, value)]
            if len(names) > 1:
                raise ValueError(f"inputs {' and '.join(names)} are one array: a replay could not tell them apart")
            if names:
                self._inputs.append((upload, names[0]))
            elif upload.given.dtype.kind in "iub":
                raise ValueError(
                    f"{upload.given.dtype} of shape {upload.given.shape} was uploaded within a graph, and is none of "
                    f"its inputs ({', '.join(inputs)}): every replay would repeat it"
                )

    def stage(self, inputs: Mapping[str, Any]) -> Staged:
        """What a replay on these inputs uploads, worked out while the device may still be at the last one."""
        current: dict[int, np.ndarray] = {}
        staged: Staged = []
        for upload, name in self._inputs:
            value = np.asarray(inputs[name])
            if value.shape != upload.given.shape:
                raise ValueError(f"a graph of {name} {upload.given.shape} was given {value.shape}")
            current[id(upload)] = value
            staged.append((upload.buffer, value.astype(upload.dtype)))
        for derived in self._derived:
            if any(isinstance(s, Upload) for s in derived.sources):
                values = derived.compute(*(current.get(id(s), _value(s)) for s in derived.sources))
                staged.append((derived.buffer, values))
        return staged

    def replay(self, inputs: Mapping[str, Any] | Staged) -> None:
        """Queue the work again, on new inputs of the same shapes, or on what `stage` made of them.

        Waits until the last replay has read its own.
        """
        self._wait()
        for buffer, values in inputs if isinstance(inputs, list) else self.stage(inputs):
            buffer[...] = values.reshape(-1).view(np.uint8)
        for derived in self._derived:
            if not any(isinstance(s, Upload) for s in derived.sources):  # numbers: as they are now
                derived.buffer[...] = derived.compute(*map(_value, derived.sources)).reshape(-1).view(np.uint8)
        self.backend.driver.replay(self.graph)
        self._replayed = self.backend.driver.record()

    def _wait(self) -> None:
        if self._replayed is not None and not self.backend.driver.finished(self._replayed):
            self.backend.synchronize()


def _value(source: Any) -> Any:
    """What to compute with now."""
    return source.given if isinstance(source, Upload) else getattr(source, "current", source)


def _same_memory(a: Any, b: Any) -> bool:
    return (
        isinstance(a, np.ndarray)
        and isinstance(b, np.ndarray)
        and a.size == b.size
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )
