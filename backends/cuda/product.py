"""Matrix products: which operand is transposed, where batches lie, and what the library is told."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from minibert.backends.cuda.array import DeviceArray
from minibert.backends.cuda.driver import Matrix, Product

EPILOGUES = (None, "bias", "gelu", "bias_gradient")
BIASED = ("bias", "gelu")  # those that read one


def multiply(
    device: Any, a: DeviceArray, b: DeviceArray, bias: DeviceArray | None, epilogue: str | None,
    out: DeviceArray | None,
) -> Any:  # fmt: skip
    """a @ b as `CudaBackend.gemm` says. Raises ValueError for shapes, and TypeError for dtypes, that do not fit."""
    if a.dtype != b.dtype or a.dtype.name not in device.dtypes:
        raise TypeError(f"a product takes two arrays of one dtype ({', '.join(device.dtypes)}): {a.dtype}, {b.dtype}")
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError(f"product of shapes {a.shape} and {b.shape}: expected (..., m, k) and (..., k, n)")
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*lead, m, n)
    if epilogue not in EPILOGUES or (bias is not None) != (epilogue in BIASED):
        raise ValueError(
            f"epilogue {epilogue!r} and bias {bias}: expected 'bias' or 'gelu' and a bias, or 'bias_gradient' or None "
            f"and no bias"
        )
    if epilogue == "bias_gradient" and not a.ndim == b.ndim == 2:
        raise ValueError(f"epilogue 'bias_gradient' takes two matrices, got shapes {a.shape} and {b.shape}")
    if bias is not None and (bias.shape, bias.dtype) != ((n,), a.dtype):
        raise ValueError(f"expected a bias of shape ({n},), {a.dtype}, got {bias}")
    if out is None:
        out = device.empty(shape, a.dtype)
    elif (out.shape, out.dtype) != (shape, a.dtype) or not (
        out.is_contiguous or (_is_rows(out) and epilogue != "gelu")
    ):
        raise ValueError(f"expected a contiguous `out`, or rows that lie apart, of shape {shape}, {a.dtype}, got {out}")
    if b.ndim == 2 and a.ndim > 2:  # every row counts alike
        rows = prod(a.shape[:-1])
        flat = multiply(device, a.reshape(rows, k), b, bias, epilogue, out.reshape(rows, n))
        return tuple(x.reshape(shape) for x in flat) if isinstance(flat, tuple) else flat.reshape(shape)
    if epilogue == "bias_gradient" and n == 0:  # sums there are, also beside no product
        return out, multiply(device, a, device.zeros((k, 1), a.dtype), None, epilogue, None)[1]
    before = device.empty(shape, a.dtype) if epilogue == "gelu" else None
    sums = device.empty((m,), a.dtype) if epilogue == "bias_gradient" else None
    if out.size:
        if k == 0:  # over no elements: as over a zero
            k = 1
            a, b = (device.zeros(s, out.dtype) for s in ((*a.shape[:-1], k), (*b.shape[:-2], k, n)))
        vector = sums if bias is None else bias.contiguous()
        a, left = _operand(a, lead)
        b, right = _operand(b, lead)
        target = Matrix(out.address, n if out.is_contiguous else out.strides[0], m * n)
        device.driver.multiply(
            Product(
                m,
                n,
                k,
                prod(lead),
                left,
                right,
                target,
                out.dtype,
                device.product_mode,
                epilogue,
                0 if vector is None else vector.address,
                0 if before is None else before.address,
            )
        )
    beside = before if sums is None else sums
    return out if beside is None else (out, beside)


def _is_rows(x: DeviceArray) -> bool:
    """Whether `x` is a matrix whose rows are whole, and lie apart."""
    return x.ndim == 2 and (x.strides[1] == 1 or x.shape[1] == 1) and x.strides[0] >= x.shape[1]


def _operand(x: DeviceArray, lead: tuple[int, ...]) -> tuple[DeviceArray, Matrix]:
    """How `x`, broadcast over the batch, lies in memory; a copy where the library could not read it."""
    found = _as_it_lies(x, lead)
    if found is None:
        x = x.copy()
        found = _as_it_lies(x, lead)
        if found is None:  # one that broadcasts over a part of the batch
            x = x.broadcast_to((*lead, *x.shape[-2:])).copy()
            found = _as_it_lies(x, lead)
    assert found is not None
    return x, found


def _as_it_lies(x: DeviceArray, lead: tuple[int, ...]) -> Matrix | None:
    rows, columns = x.shape[-2:]
    row, column = x.strides[-2:]
    if (column == 1 or columns == 1) and (row >= columns or rows == 1):
        leading, transposed = (max(row, columns) if rows > 1 else columns), False
    elif (row == 1 or rows == 1) and (column >= rows or columns == 1):
        leading, transposed = (max(column, rows) if columns > 1 else rows), True
    else:
        return None
    stride = _batch_stride(x, lead)
    return None if stride is None else Matrix(x.address, leading, stride, transposed)


def _batch_stride(x: DeviceArray, lead: tuple[int, ...]) -> int | None:
    """Elements from one matrix to the next, 0 where there is one for all; None where no single such number says it."""
    if prod(lead) == 1:
        return 0
    layout = np.broadcast_to(x.layout, (*lead, *x.shape[-2:]))
    expected: int | None = None  # built up from the innermost axis
    for size, stride in zip(reversed(lead), reversed(layout.strides[: len(lead)]), strict=True):
        if size == 1:
            continue
        if expected is None:
            found = stride
            if stride < 0:  # a batch taken backwards: no library reads that
                return None
        elif stride != expected:
            return None
        expected = stride * size
    return found // x.itemsize
