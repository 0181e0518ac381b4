"""A stand-in for cuBLASLt that computes on host memory, in columns, and products to try on it.

`ColumnMajor` has the C interface of cuBLASLt, called through ctypes with the real argument types, and does what its
header says, so a layout that is wrong gives a wrong product.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from minibert.backends.cuda import cublaslt
from minibert.backends.cuda.cublaslt import PROTOTYPES, Algorithm, CublasLt
from minibert.backends.cuda.driver import Matrix, Product

STREAM = 77
# Bytes of each attribute, from the comments of cublasLt.h
SIZES = {
    "MatmulDesc": {3: 4, 4: 4, 7: 4, 8: 8, 11: 8, 12: 8, 13: 8},
    "MatrixLayout": {5: 4, 6: 8},
    "MatmulPreference": {1: 8, 3: 4, 5: 4, 6: 4, 7: 4, 8: 4},
}


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


class ColumnMajor:
    """cuBLASLt on host memory, in float64; descriptors are dicts known by number."""

    def __init__(self) -> None:
        self.descriptors: dict[int, dict[Any, int]] = {}
        self.offers = [Algorithm(state=0)]
        self.offered = 0  # how often the heuristic was asked
        self.refuses: dict[int, int] = {}  # algorithm -> status
        self.heuristic_status = 0
        self.preferences: list[dict[Any, int]] = []
        self.calls: list[dict[str, int]] = []
        self.types: dict[int, np.dtype[Any]] = {0: np.dtype(np.float32), 2: np.dtype(np.float16)}
        for name, arguments in PROTOTYPES.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(getattr(self, f"_{name[8:]}")))

    def cublasLtGetVersion(self) -> int:
        return 120901

    def cublasLtGetStatusString(self, status: int) -> bytes:
        return f"CUBLAS_STATUS_{status}".encode()

    def _make(self, handle: Any, **fields: int) -> int:
        number = len(self.descriptors) + 1
        self.descriptors[number] = dict(fields)
        handle[0] = number
        return 0

    def _Create(self, handle: Any) -> int:
        return self._make(handle)

    def _MatmulDescCreate(self, handle: Any, compute: int, scale: int) -> int:
        return self._make(handle, compute=compute, scale=scale)

    def _MatrixLayoutCreate(self, handle: Any, kind: int, rows: int, columns: int, leading: int) -> int:
        return self._make(handle, kind=kind, rows=rows, columns=columns, leading=leading)

    def _MatmulPreferenceCreate(self, handle: Any) -> int:
        return self._make(handle)

    def _MatmulPreferenceDestroy(self, preference: int) -> int:
        self.preferences.append(self.descriptors[preference])
        return 0

    def _setter(self, kind: str, descriptor: int, attribute: int, value: int, size: int) -> int:
        if SIZES[kind].get(attribute) != size:
            return cublaslt.INVALID_VALUE
        self.descriptors[descriptor][attribute] = int.from_bytes(ctypes.string_at(value, size), "little")
        return 0

    def _MatmulDescSetAttribute(self, *arguments: int) -> int:
        return self._setter("MatmulDesc", *arguments)

    def _MatrixLayoutSetAttribute(self, *arguments: int) -> int:
        return self._setter("MatrixLayout", *arguments)

    def _MatmulPreferenceSetAttribute(self, *arguments: int) -> int:
        return self._setter("MatmulPreference", *arguments)

    def _MatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        found, count = arguments[-2:]
        self.offered += 1
        for i, offer in enumerate(self.offers):
            found[i] = offer
        count[0] = len(self.offers)
        return self.heuristic_status

    def _Matmul(
        self, handle: int, operation: int, alpha: int, a: int, a_layout: int, b: int, b_layout: int, beta: int, c: int,
        c_layout: int, d: int, d_layout: int, algorithm: int, workspace: int, size: int, stream: int,
    ) -> int:  # fmt: skip
        number = ctypes.cast(algorithm, ctypes.POINTER(ctypes.c_uint64))[0]
        if number in self.refuses:
            return self.refuses[number]
        told = self.descriptors[operation]
        out_layout = self.descriptors[d_layout]
        self.calls.append({"workspace": workspace, "size": size, "stream": stream, "compute": told["compute"]})
        one, zero = (ctypes.cast(p, ctypes.POINTER(ctypes.c_float))[0] for p in (alpha, beta))
        if (one, zero, c, c_layout, told["scale"]) != (1, 0, d, d_layout, 0):
            return cublaslt.INVALID_VALUE
        left = self.columns(a, self.descriptors[a_layout], told[3]).astype(np.float64)
        right = self.columns(b, self.descriptors[b_layout], told[4]).astype(np.float64)
        out = self.columns(d, out_layout, 0)
        if left.shape[2] != right.shape[1] or out.shape != (len(left), left.shape[1], right.shape[2]):
            return cublaslt.INVALID_VALUE
        result = left @ right
        if told[7] in (4, 164):
            bias = {**out_layout, "columns": 1, "leading": out_layout["rows"], 5: 1, 6: 0}
            if told[8] % 16:
                return 13
            result += self.columns(told[8], bias, 0)
        if told[7] == 164:
            if told[12] % 8 or told[11] % 16 or (out_layout[5] > 1 and told[13] % 8):
                return 13
            self.columns(told[11], {**out_layout, "leading": told[12], 6: told.get(13, 0)}, 0)[...] = result
            result = gelu(result)
        if told[7] in (256, 512):  # BGRADA: op(A) over k, for each row of D; BGRADB: op(B) over k, for each column
            sums = left.sum(axis=2) if told[7] == 256 else right.sum(axis=1)
            if told[8] % 16 or len(sums) != 1:
                return 13
            vector = {**out_layout, "rows": sums.size, "columns": 1, "leading": sums.size}
            self.columns(told[8], vector, 0)[...] = sums[..., None]
        out[...] = result
        return 0

    def columns(self, address: int, layout: dict[Any, int], transpose: int) -> np.ndarray:
        """(batch, rows, columns) of memory laid out column by column."""
        dtype = self.types[layout["kind"]]
        rows, columns, leading, batch, stride = (layout[key] for key in ("rows", "columns", "leading", 5, 6))
        assert leading >= rows and batch >= 1
        extent = (batch - 1) * stride + (columns - 1) * leading + rows
        memory = np.frombuffer((ctypes.c_char * (extent * dtype.itemsize)).from_address(address), dtype)
        seen = np.lib.stride_tricks.as_strided(
            memory, (batch, rows, columns), tuple(s * dtype.itemsize for s in (stride, 1, leading))
        )
        return seen.swapaxes(1, 2) if transpose else seen


class Host:
    """Memory of the host in the place of a device's."""

    def __init__(self) -> None:
        self.held: list[np.ndarray] = []
        self.allocated: list[int] = []
        self.copied: list[int] = []

    def place(self, values: np.ndarray, offset: int = 0) -> np.ndarray:
        """`values`, in row-major order, `offset` bytes beyond a multiple of 256."""
        room = np.full(values.nbytes + 512, 0xFF, np.uint8)  # NaN
        self.held.append(room)
        start = -room.ctypes.data % 256 + offset
        placed = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        placed[...] = values
        return placed

    def allocate(self, nbytes: int) -> int:
        self.allocated.append(nbytes)
        return self.place(np.empty(nbytes, np.uint8)).ctypes.data

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.copied.append(nbytes)
        ctypes.memmove(target, source, nbytes)


class Case:
    """A product of random operands, told as `Product`, with what it must give."""

    def __init__(
        self, m: int = 6, n: int = 8, k: int = 5, *, batch: int = 1, a_transposed: bool = False,
        b_transposed: bool = False, shared: str = "", dtype: Any = np.float32, mode: str = "float32",
        epilogue: str | None = None, padding: int = 0, bias_offset: int = 0,
    ) -> None:  # fmt: skip
        self.host, random = Host(), np.random.default_rng(m * n * k)

        def operand(name: str, rows: int, columns: int, transposed: bool) -> tuple[np.ndarray, Matrix]:
            count = 1 if name == shared else batch
            lies = (columns, rows) if transposed else (rows, columns)
            stored = self.host.place(random.standard_normal((count, lies[0], lies[1] + padding)).astype(dtype))
            stride = 0 if name == shared else stored[0].size
            values = stored[..., : lies[1]].astype(np.float64)
            matrix = Matrix(stored.ctypes.data, lies[1] + padding, stride, transposed)
            return values.swapaxes(1, 2) if transposed else values, matrix

        a, a_matrix = operand("a", m, k, a_transposed)
        b, b_matrix = operand("b", k, n, b_transposed)
        empty = np.full((batch, m, n + padding), np.nan, dtype)
        self.out, self.before = self.host.place(empty), self.host.place(empty)
        bias = random.standard_normal(n) if epilogue != "bias_gradient" else np.full(m, np.nan)
        self.bias = self.host.place(bias.astype(dtype), bias_offset)
        self.expected_sums = a.sum(axis=2)[0]
        added = self.bias.astype(np.float64) if epilogue in ("bias", "gelu") else 0
        self.expected_before = np.broadcast_to(a @ b + added, (batch, m, n))
        self.expected = gelu(self.expected_before) if epilogue == "gelu" else self.expected_before
        self.product = Product(
            m, n, k, batch, a_matrix, b_matrix, Matrix(self.out.ctypes.data, n + padding, self.out[0].size),
            np.dtype(dtype), mode, epilogue, self.bias.ctypes.data if epilogue else 0,
            self.before.ctypes.data if epilogue == "gelu" else 0,
        )  # fmt: skip
        self.n = n

    def check(self, library: Any) -> CublasLt:
        """Run it on `library` and compare."""
        lt = CublasLt(library, self.host.allocate, self.host.copy)
        lt.matmul(STREAM, self.product)
        self.compare()
        return lt

    def compare(self, roundings: int = 1) -> None:
        """Hold what was written against float64; `roundings` is how many each element may have gone through."""
        unit = float(np.finfo(self.out.dtype).eps) if self.out.dtype.kind == "f" else 2.0**-7
        close = {"rtol": unit * roundings, "atol": unit * roundings}
        np.testing.assert_allclose(self.out[..., : self.n].astype(np.float64), self.expected, **close)
        assert np.isnan(self.out[..., self.n :].astype(np.float64)).all(), "written beyond its columns"
        if self.product.epilogue == "bias_gradient":
            np.testing.assert_allclose(self.bias.astype(np.float64), self.expected_sums, **close)
        if self.product.epilogue == "gelu":
            np.testing.assert_allclose(self.before[..., : self.n].astype(np.float64), self.expected_before, **close)
