"""An array in device memory: an address, a shape and strides. It holds no values that Python could read by accident."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided


class DeviceArray:
    """Memory of `block`, seen through `layout`.

    `layout` is a NumPy array of the same shape, dtype and strides over memory that is not there: NumPy works out views
    (slices, transposes, shapes) on it, and how far each begins from its base. Its elements are never touched.
    `host` is a copy of integers that came from the host: kernels' launches may depend on them.
    """

    __slots__ = ("address", "block", "device", "host", "layout")

    def __init__(
        self, device: Any, block: Any, address: int, layout: np.ndarray, host: np.ndarray | None = None
    ) -> None:
        self.device, self.block, self.address, self.layout, self.host = device, block, address, layout, host

    shape = property(lambda self: self.layout.shape)
    ndim = property(lambda self: self.layout.ndim)
    size = property(lambda self: self.layout.size)
    dtype = property(lambda self: self.layout.dtype)
    nbytes = property(lambda self: self.layout.nbytes)
    itemsize = property(lambda self: self.layout.itemsize)
    is_contiguous = property(lambda self: self.layout.flags.c_contiguous)

    @property
    def strides(self) -> tuple[int, ...]:
        """In elements, not bytes."""
        return tuple(stride // self.itemsize for stride in self.layout.strides)

    def _view(self, layout: np.ndarray) -> DeviceArray:
        offset = layout.__array_interface__["data"][0] - self.layout.__array_interface__["data"][0]
        return DeviceArray(self.device, self.block, self.address + (offset if layout.size else 0), layout)

    def __getitem__(self, index: Any) -> DeviceArray:
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            whole = isinstance(part, int | np.integer) and not isinstance(part, bool)
            if not (whole or isinstance(part, slice) or part is None or part is Ellipsis):
                raise NotOnDevice(
                    f"a device array takes slices and whole numbers as an index, got {part!r:.80}: rows by an array of "
                    f"indices take a kernel, op gather_rows"
                )
        return self._view(self.layout[parts if any(part is Ellipsis for part in parts) else (*parts, ...)])

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self if index is Ellipsis else self[index]
        source = value if isinstance(value, DeviceArray) else self.device.asarray(value, dtype=self.dtype)
        self.device.copy_into(target, source)
        self.host = None  # what was uploaded is no longer what is there

    def reshape(self, *shape: Any) -> DeviceArray:
        """The same elements in another shape: a view where the layout allows it, else a copy."""
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int | np.integer) else shape
        try:
            view = self._view(np.reshape(self.layout, wanted, copy=False))
        except ValueError:
            if self.is_contiguous:  # then every shape of as many elements is a view
                raise
            return self.copy().reshape(wanted)
        view.host = None if self.host is None else self.host.reshape(wanted)
        return view

    def transpose(self, *axes: Any) -> DeviceArray:
        return self._view(self.layout.transpose(*axes))

    def swapaxes(self, first: int, second: int) -> DeviceArray:
        return self._view(self.layout.swapaxes(first, second))

    def broadcast_to(self, shape: tuple[int, ...]) -> DeviceArray:
        return self._view(np.broadcast_to(self.layout, shape))

    def contiguous(self) -> DeviceArray:
        """This array, or a copy laid out row by row."""
        return self if self.is_contiguous else self.copy()

    def copy(self) -> DeviceArray:
        made = self.device.empty(self.shape, self.dtype)
        self.device.copy_into(made, self)
        made.host = self.host
        return made

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For CuPy, PyTorch and Numba, with no copy; meaningful where `device` is a GPU."""
        if self.device.name != "cupy":
            raise AttributeError("this array is on the emulator, in no GPU's memory: use backend.numpy(x)")
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3,
            "strides": self.layout.strides,
        }  # fmt: skip

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise NotOnDevice("an array on a device does not turn into a NumPy array by itself: use backend.numpy(x)")

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:  # NumPy's numbers * x, np.exp(x)
        return self.__array__()

    def extent(self) -> tuple[int, int]:
        """Addresses that the elements lie between: of the first byte, and after the last."""
        steps = [(count - 1) * stride for count, stride in zip(self.shape, self.layout.strides, strict=True)]
        low, high = (sum(step for step in steps if (step > 0) == up) for up in (False, True))
        return self.address + low, self.address + high + self.itemsize

    def overlaps(self, other: DeviceArray) -> bool:
        """Whether the two may share elements."""
        (low, high), (other_low, other_high) = self.extent(), other.extent()
        return bool(self.size and other.size) and low < other_high and other_low < high

    def __len__(self) -> int:
        return len(self.layout)

    def __repr__(self) -> str:
        return f"DeviceArray(shape={self.shape}, dtype={self.dtype}, device={self.device.name})"


class NotOnDevice(TypeError, AttributeError):
    """A formula asks for arithmetic: that takes a kernel, or the host."""


def _refused(name: str) -> Any:
    def refuse(self: DeviceArray, *args: Any) -> Any:
        raise NotOnDevice(f"a device array has no {name}: every operation goes through backend.run(op, ...)")

    return refuse


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod",
    "pow", "rpow", "matmul", "rmatmul", "neg", "pos", "abs", "lt", "le", "gt", "ge", "eq", "ne", "getattr", "invert",
    "and", "rand", "or", "ror", "xor", "rxor", "bool", "int", "float", "contains",
):  # fmt: skip
    setattr(DeviceArray, f"__{_name}__", _refused(f"__{_name}__"))
DeviceArray.__hash__ = object.__hash__  # type: ignore[method-assign]


def ghost(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A row-major layout over memory that is not there."""
    strides = np.cumprod([dtype.itemsize, *reversed(shape[1:])])[::-1] if shape else ()
    return as_strided(np.empty(1, dtype), shape, tuple(int(s) for s in strides), writeable=False)
