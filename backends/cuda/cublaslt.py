"""Matrix products by cuBLASLt, through ctypes.

Why not a package: CuPy refuses cuBLAS during stream capture and cannot set its workspace, so it cannot give a step that
is one graph. nvmath-python can, but it wants arrays of a library that it knows, plans in Python (longer than a small
product takes), and brings over 400 MB of packages. What is needed here is eleven functions that take addresses.

cuBLASLt thinks in columns: a row-major (r, c) matrix is, to it, a column-major (c, r) one. So out = a b is asked for as
outᵀ = bᵀ aᵀ: its A is our b, its B our a, and its bias, one number for each row of outᵀ, is one for each column of out.
The gradient of a bias, a summed over k, is to it the sum of B: one number for each column of outᵀ (BGRADB, not BGRADA).

The same bits come out of every run: of the ways to split a sum over blocks only those are allowed that write partial
sums, in float32, to the workspace and add them in a separate step. Each stream has a workspace of its own, so that
streams do not disturb each other, at an address that never changes, so that a graph may hold it.

Numbers and types are those of cublasLt.h, cublas_api.h and library_types.h (cuBLAS 12 and 13).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from minibert.backends.base import BackendUnavailable
from minibert.backends.cuda.driver import ALIGNMENT, Matrix, Product
from minibert.errors import pip_install

WORKSPACE = 32 * 2**20  # bytes for each stream: what NVIDIA advises for Hopper
BIAS_ALIGNMENT = 16  # bytes: what an epilogue's vector loads assume, unchecked
BEFORE_MULTIPLE = 8  # of the leading dimension of what GELU_AUX writes
CANDIDATES = 8  # algorithms to ask for

SUCCESS, INVALID_VALUE, ARCH_MISMATCH, NOT_SUPPORTED = 0, 7, 8, 15  # cublasStatus_t
REFUSALS = (INVALID_VALUE, ARCH_MISMATCH, NOT_SUPPORTED)  # this algorithm will not do it; another one may
DATA_TYPE = {"float32": 0, "float16": 2, "bfloat16": 14}  # CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF
COMPUTE_TYPE = {"float32": 68, "tf32": 77}  # CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32
SCALE_TYPE = DATA_TYPE["float32"]  # of alpha and beta
EPILOGUE = {None: 1, "bias": 4, "gelu": 164, "bias_gradient": 512}  # CUBLASLT_EPILOGUE_DEFAULT, _BIAS, ...
REDUCTION_IN_FLOAT32 = 2  # CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE; _NONE is 0, and always allowed


class Attribute(NamedTuple):
    """What a descriptor holds: its number in the enum, and the C type of its value."""

    number: int
    type: Any


TRANSPOSE_A = Attribute(3, c_int32)  # CUBLASLT_MATMUL_DESC_...
TRANSPOSE_B = Attribute(4, c_int32)
EPILOGUE_KIND = Attribute(7, c_uint32)
BIAS_POINTER = Attribute(8, c_void_p)
AUX_POINTER = Attribute(11, c_void_p)
AUX_LEADING = Attribute(12, c_int64)
AUX_BATCH_STRIDE = Attribute(13, c_int64)

BATCH_COUNT = Attribute(5, c_int32)  # CUBLASLT_MATRIX_LAYOUT_...
BATCH_STRIDE = Attribute(6, c_int64)

MOST_WORKSPACE = Attribute(1, c_uint64)  # CUBLASLT_MATMUL_PREF_...
REDUCTION_SCHEMES = Attribute(3, c_uint32)
ALIGNMENT_OF = {name: Attribute(5 + i, c_uint32) for i, name in enumerate("ABCD")}


class Algorithm(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", c_uint64 * 8),  # cublasLtMatmulAlgo_t
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


_SET = (c_void_p, c_int, c_void_p, c_size_t)
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (POINTER(c_void_p),),
    "cublasLtMatmulDescCreate": (POINTER(c_void_p), c_int, c_int),
    "cublasLtMatmulDescSetAttribute": _SET,
    "cublasLtMatrixLayoutCreate": (POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutSetAttribute": _SET,
    "cublasLtMatmulPreferenceCreate": (POINTER(c_void_p),),
    "cublasLtMatmulPreferenceSetAttribute": _SET,
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    "cublasLtMatmulAlgoGetHeuristic": (*(c_void_p,) * 7, c_int, POINTER(Algorithm), POINTER(c_int)),
    "cublasLtMatmul": (*(c_void_p,) * 14, c_size_t, c_void_p),
}


class CublasError(RuntimeError):
    """cuBLASLt failed."""


class NoAlgorithm(CublasError):
    """cuBLASLt cannot do this product in one call; the message says what it answered."""


def load(major: int) -> Any:
    """libcublasLt for CUDA `major`: of NVIDIA's wheels, of a CUDA toolkit, or of the system.

    Raises BackendUnavailable, with the wheel to install.
    """
    name = f"libcublasLt.so.{major}"
    wheels = getattr(find_spec("nvidia"), "submodule_search_locations", None) or ()
    folders = [Path(wheel, *part, "lib") for wheel in wheels for part in ((f"cu{major}",), ("cublas",))]
    named = [os.environ.get(name) for name in ("CUDA_PATH", "CUDA_HOME", "CONDA_PREFIX")]
    toolkits = (*named, "/usr/local/cuda", f"/usr/local/cuda-{major}")
    folders += [Path(toolkit, lib) for toolkit in toolkits if toolkit for lib in ("lib64", "lib")]
    tried = [str(folder / name) for folder in folders if (folder / name).is_file()]
    reason = ""
    for candidate in (*tried, name):  # the bare name: what the dynamic linker knows
        try:
            return declare(ctypes.CDLL(candidate))
        except (OSError, AttributeError) as error:
            reason = str(error)
    wheel = "nvidia-cublas-cu12" if major == 12 else f"nvidia-cublas=={major}.*"
    raise BackendUnavailable(f"matrix products need {name} ({reason}): {pip_install(wheel)}")


def declare(library: Any) -> Any:
    """Tell ctypes what the functions take. Raises AttributeError where the library lacks one."""
    for name, arguments in PROTOTYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.cublasLtGetStatusString.argtypes, library.cublasLtGetStatusString.restype = (c_int,), c_char_p
    library.cublasLtGetVersion.argtypes, library.cublasLtGetVersion.restype = (), c_size_t
    return library


class Plan(NamedTuple):
    """Descriptors of one kind of product, and the algorithms that do it, the best one first."""

    operation: c_void_p
    a: c_void_p
    b: c_void_p
    out: c_void_p
    algorithms: list[Algorithm]


class CublasLt:
    """A handle of the library on the current device, with the plans made so far.

    `allocate(nbytes)` gives memory for good; `copy(target, source, nbytes, stream)` copies on the device, in order.
    """

    def __init__(
        self, library: Any, allocate: Callable[[int], int], copy: Callable[[int, int, int, int], None]
    ) -> None:
        self._library, self._allocate, self._copy = library, allocate, copy
        self._handle = self._new("cublasLtCreate")
        self._one, self._zero = c_float(1), c_float(0)
        self._plans: dict[tuple[Any, ...], Plan] = {}
        self._workspaces: dict[int, int] = {}  # stream -> address
        self._biases: dict[int, tuple[int, int]] = {}  # stream -> address and bytes

    def version(self) -> str:
        number = self._library.cublasLtGetVersion()
        unit = 10000 if number >= 100000 else 1000  # 12.9.1 is 120901, 11.5.1 was 11501
        return f"{number // unit}.{number % unit // 100}.{number % 100}"

    def matmul(self, stream: int, product: Product) -> None:
        """Queue a product on a stream. Raises NoAlgorithm where it takes another way, CublasError where it failed."""
        if product.epilogue in ("bias", "gelu"):
            product = product._replace(bias=self._aligned_bias(stream, product))
        plan = self._plan(product)
        if product.epilogue is not None:
            self._describe(plan.operation, BIAS_POINTER, product.bias)
        if product.epilogue == "gelu":
            self._describe(plan.operation, AUX_POINTER, product.before)
        if stream not in self._workspaces:
            self._workspaces[stream] = self._allocate(WORKSPACE)
        out = product.out.address
        while plan.algorithms:
            status = self._library.cublasLtMatmul(
                self._handle, plan.operation, byref(self._one), product.b.address, plan.a, product.a.address, plan.b,
                byref(self._zero), out, plan.out, out, plan.out, byref(plan.algorithms[0]),
                self._workspaces[stream], WORKSPACE, stream,
            )  # fmt: skip
            if status == SUCCESS:
                return
            if status not in REFUSALS:
                raise CublasError(f"cublasLtMatmul: {self._status(status)}, in {_said(product)}")
            del plan.algorithms[0]  # the heuristic was wrong about it
        raise NoAlgorithm(f"cuBLASLt {self.version()} has no algorithm for {_said(product)}")

    # ------------------------------------------------------------------------------------------------- plans

    def _plan(self, product: Product) -> Plan:
        key = (
            *product[:4], product.a[1:], product.b[1:], product.out[1:], product.dtype.name, product.mode,
            product.epilogue, *map(alignment, _addresses(product)),
        )  # fmt: skip
        if key not in self._plans:
            self._plans[key] = self._made(product)
        return self._plans[key]

    def _made(self, product: Product) -> Plan:
        m, n, k = product[:3]
        mode = product.mode if product.dtype.name == "float32" else "float32"
        operation = self._new("cublasLtMatmulDescCreate", COMPUTE_TYPE[mode], SCALE_TYPE)
        self._describe(operation, TRANSPOSE_A, int(product.b.transposed))  # CUBLAS_OP_N 0, CUBLAS_OP_T 1
        self._describe(operation, TRANSPOSE_B, int(product.a.transposed))
        self._describe(operation, EPILOGUE_KIND, EPILOGUE[product.epilogue])
        if product.epilogue is not None:
            self._describe(operation, BIAS_POINTER, product.bias)  # the heuristic reads its alignment off it
        if product.epilogue == "gelu":
            self._describe(operation, AUX_POINTER, product.before)
            self._describe(operation, AUX_LEADING, product.out.leading)
            if product.batch > 1:
                self._describe(operation, AUX_BATCH_STRIDE, product.out.batch_stride)
        a = self._layout(product, product.b, k, n)
        b = self._layout(product, product.a, m, k)
        out = self._layout(product, product.out, m, n)
        algorithms = [] if _breaks_rules(product) else self._algorithms(product, operation, a, b, out)
        return Plan(operation, a, b, out, algorithms)

    def _layout(self, product: Product, matrix: Matrix, rows: int, columns: int) -> c_void_p:
        """What lies in memory: a row-major (rows, columns) matrix or its transpose, said in columns."""
        lies = (rows, columns) if matrix.transposed else (columns, rows)
        layout = self._new("cublasLtMatrixLayoutCreate", DATA_TYPE[product.dtype.name], *lies, matrix.leading)
        self._set("cublasLtMatrixLayoutSetAttribute", layout, BATCH_COUNT, product.batch)
        self._set("cublasLtMatrixLayoutSetAttribute", layout, BATCH_STRIDE, matrix.batch_stride)
        return layout

    def _algorithms(self, product: Product, operation: c_void_p, *layouts: c_void_p) -> list[Algorithm]:
        a, b, out = layouts
        preference = self._new("cublasLtMatmulPreferenceCreate")
        prefer = "cublasLtMatmulPreferenceSetAttribute"
        self._set(prefer, preference, MOST_WORKSPACE, WORKSPACE)
        self._set(prefer, preference, REDUCTION_SCHEMES, REDUCTION_IN_FLOAT32)
        addresses = (product.b.address, product.a.address, product.out.address, product.out.address)
        for name, address in zip("ABCD", addresses, strict=True):
            self._set(prefer, preference, ALIGNMENT_OF[name], alignment(address))
        found, count = (Algorithm * CANDIDATES)(), c_int()
        status = self._library.cublasLtMatmulAlgoGetHeuristic(
            self._handle, operation, a, b, out, out, preference, CANDIDATES, found, byref(count)
        )
        self._check("cublasLtMatmulPreferenceDestroy", self._library.cublasLtMatmulPreferenceDestroy(preference))
        if status not in (SUCCESS, *REFUSALS):
            raise CublasError(f"cublasLtMatmulAlgoGetHeuristic: {self._status(status)}, in {_said(product)}")
        usable = [f for f in found[: count.value] if f.state == SUCCESS and f.workspace <= WORKSPACE]
        return usable if status == SUCCESS else []

    def _aligned_bias(self, stream: int, product: Product) -> int:
        """The address of the bias, or of a copy at an address that its vector loads can read.

        No preference tells the heuristic how a bias is aligned, and kernels fault on one that is not
        (github.com/pytorch/pytorch/pull/194497).
        """
        if product.bias % BIAS_ALIGNMENT == 0:
            return product.bias
        nbytes = product.n * product.dtype.itemsize
        address, size = self._biases.get(stream, (0, 0))
        if nbytes > size:  # the smaller block stays: a graph may hold its address
            address, size = self._allocate(nbytes), nbytes
            self._biases[stream] = address, size
        self._copy(address, product.bias, nbytes, stream)
        return address

    # ------------------------------------------------------------------------------------- calls of the library

    def _new(self, create: str, *arguments: int) -> c_void_p:
        made = c_void_p()
        self._check(create, getattr(self._library, create)(byref(made), *arguments))
        return made

    def _describe(self, operation: c_void_p, attribute: Attribute, value: int) -> None:
        self._set("cublasLtMatmulDescSetAttribute", operation, attribute, value)

    def _set(self, function: str, descriptor: c_void_p, attribute: Attribute, value: int) -> None:
        held = attribute.type(value)
        status = getattr(self._library, function)(descriptor, attribute.number, byref(held), ctypes.sizeof(held))
        self._check(f"{function} {attribute.number}", status)

    def _check(self, what: str, status: int) -> None:
        if status != SUCCESS:
            raise CublasError(f"{what}: {self._status(status)}")

    def _status(self, status: int) -> str:
        return f"{self._library.cublasLtGetStatusString(status).decode()} ({status})"


def alignment(address: int) -> int:
    """The largest power of two that divides an address, as far as it matters."""
    return min(ALIGNMENT, address & -address) or ALIGNMENT


def _addresses(product: Product) -> tuple[int, ...]:
    return product.a.address, product.b.address, product.out.address, product.bias, product.before


def _breaks_rules(product: Product) -> bool:
    """Whether what is written beside the product begins at places that cublasLt.h, or its vector stores, rule out."""
    if product.epilogue == "bias_gradient":
        return product.bias % BIAS_ALIGNMENT != 0
    lies = product.out.leading | (product.out.batch_stride if product.batch > 1 else 0)
    return product.epilogue == "gelu" and bool(lies % BEFORE_MULTIPLE or product.before % BIAS_ALIGNMENT)


def _said(product: Product) -> str:
    p = product
    operands = ", ".join(
        f"{name} {'transposed, ' if x.transposed else ''}leading dimension {x.leading}, at a multiple of "
        f"{alignment(x.address)} bytes"  # not where: it names a kind of product
        for name, x in (("a", p.a), ("b", p.b), ("out", p.out))
    )
    return (
        f"a product (m {p.m}, n {p.n}, k {p.k}, batch {p.batch}) of {p.dtype.name} in {p.mode}, epilogue {p.epilogue}: "
        f"{operands}"
    )
