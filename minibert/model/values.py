"""What a tensor has in common with the arrays of NumPy and torch: values as numbers, and parts of it by index."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from minibert.errors import UserError


class Values:
    """For a class with `numpy`, `data`, `backend`, `shape`, `slice` and `reshape`: what scripts for torch ask of it."""

    __slots__ = ()
    __array_priority__ = 1000  # so that `array * tensor` is a tensor, with its gradient, and no array

    def item(self: Any) -> float:
        """The value of a tensor of one element. Raises UserError for one of more."""
        if prod(self.shape) != 1:
            raise UserError(f"expected a tensor of one element, got shape {self.shape}; .numpy() gives all values")
        return float(self.numpy().reshape(()))

    def tolist(self: Any) -> Any:
        """The values as Python's numbers, in lists of lists."""
        return self.numpy().tolist()

    def cpu(self: Any) -> Any:
        """Itself, so that `.detach().cpu().numpy()` reads here as in torch: `numpy()` fetches values from anywhere."""
        return self

    def __array__(self: Any, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.numpy()
        cast = dtype is not None and dtype != values.dtype
        if copy is False and (cast or not isinstance(self.data, np.ndarray)):
            raise ValueError("a copy of this tensor's values cannot be avoided; leave copy=False out")
        return np.array(values, dtype) if copy else np.asarray(values, dtype)

    def __dlpack__(self: Any, **options: Any) -> Any:
        """For `torch.from_dlpack` and their like."""
        return self.backend.numpy(self.data).__dlpack__(**options)

    def __dlpack_device__(self: Any) -> Any:
        return self.numpy().__dlpack_device__()

    def __float__(self) -> float:
        return self.item()

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __round__(self, digits: int | None = None) -> float:
        return round(self.item(), digits)

    def __abs__(self) -> Any:
        raise UserError("there is no gradient of abs(): abs(float(x)), or abs(x.numpy()), gives values")

    def __rtruediv__(self, other: Any) -> Any:
        raise UserError("there is no gradient of a divisor: 1 / float(x), or 1 / x.numpy(), gives values")

    def __lt__(self, other: Any) -> Any:
        """Of the values, as NumPy; `==` asks whether two are the same tensor."""
        return np.asarray(self) < np.asarray(other)

    def __le__(self, other: Any) -> Any:
        return np.asarray(self) <= np.asarray(other)

    def __gt__(self, other: Any) -> Any:
        return np.asarray(self) > np.asarray(other)

    def __ge__(self, other: Any) -> Any:
        return np.asarray(self) >= np.asarray(other)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __len__(self: Any) -> int:
        if not self.shape:
            raise TypeError("len() of a tensor without axes")
        return int(self.shape[0])

    def __iter__(self: Any) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self: Any, index: Any) -> Any:
        """Numbers and slices of step 1, as in `x[:, 0]`; gradients go through. Raises UserError for any other index."""
        parts = index if isinstance(index, tuple) else (index,)
        if sum(part is Ellipsis for part in parts) == 1:
            at = next(k for k, part in enumerate(parts) if part is Ellipsis)
            parts = (*parts[:at], *[slice(None)] * (self.ndim - len(parts) + 1), *parts[at + 1 :])
        if len(parts) > self.ndim or not all(map(_is_plain, parts)):
            raise UserError(
                f"index of a tensor of shape {self.shape}: expected at most {self.ndim} numbers and slices of step 1; "
                "for any other, take .numpy()[...]"
            )
        x, shape = self, list(self.shape)
        for axis, part in reversed([*enumerate(parts)]):
            size = self.shape[axis]
            if isinstance(part, slice):
                start, stop, _ = part.indices(size)
                stop = max(start, stop)
                shape[axis] = stop - start
            elif not -size <= part < size:
                raise IndexError(f"index {part} is out of range for an axis of {size}")
            else:
                start = int(part) % size
                stop = start + 1
                del shape[axis]
            if (start, stop) != (0, size):
                x = x.slice(axis, start, stop)
        return x if len(shape) == self.ndim else x.reshape(*shape)

    if not TYPE_CHECKING:  # a type checker should know a name that is not there

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"a minibert Tensor has no {name!r}; .numpy() gives its values as a NumPy array")


def _is_plain(part: Any) -> bool:
    """Whether it is a number, or a slice of step 1."""
    if isinstance(part, slice):
        return part.step in (None, 1)
    return isinstance(part, int | np.integer) and not isinstance(part, bool)
