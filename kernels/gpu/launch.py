"""From a call in Python to a CUDA kernel: signatures read from the source, arguments checked against them, launches.

    cuda = CudaFile(__file__)                               # gpu.cu, beside this file
    softmax_warp = cuda.kernel("softmax_warp", block=128)   # the launch table: a line per kernel
    softmax_warp(x, y, rows, columns, grid=blocks_for(rows, 4, x.device))

A kernel's parameters are written once, in gpu.cu; whatever a call passes is held against them before every launch, on
every driver. Which variant runs (`Storage` is float, half or bfloat16) follows from the arrays' dtype.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minibert.kernels.op import Array
from minibert.kernels.philox import Stream, first_block

KERNELS = Path(__file__).parents[1]
INCLUDE = (KERNELS, KERNELS / "gpu")  # where CUDA files find the headers of op families, and those that all share

STORAGE = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}  # -DSTORAGE=..., by dtype
MOST_THREADS = 1024  # in a block, unless __launch_bounds__ says fewer
MOST_BLOCKS = (2**31 - 1, 65535, 65535)  # of a grid, in x, y and z
WAVES = 8  # blocks for each multiprocessor at most: beyond that, a grid-stride loop does the rest

# C type -> (dtypes that a pointer to it takes, format of a scalar of it)
TYPES: dict[str, tuple[tuple[str, ...], str]] = {
    "float": (("float32",), "f"),
    "int": (("int32",), "i"),
    "unsigned": (("uint32",), "I"),
    "long long": (("int64",), "q"),
    "unsigned long long": (("uint64",), "Q"),
    "unsigned char": (("bool", "uint8"), "B"),
    "signed char": (("int8",), "b"),
    "unsigned short": (("uint16",), "H"),
    "Storage": (tuple(STORAGE), ""),
}
STRUCTS = {"Stream": 32, "Layout": 160}  # passed by value, as bytes

KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\(\s*(\w+)[^)]*\)\s*)?(\w+)\s*\(([^)]*)\)', re.S
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
CONSTANT = re.compile(r"constexpr\s+int\s+(\w+)\s*=\s*(\d+)\s*;")


class Parameter(NamedTuple):
    """One parameter of a kernel, as gpu.cu declares it."""

    name: str
    type: str
    is_pointer: bool
    is_const: bool

    @property
    def nbytes(self) -> int:
        """Of the argument."""
        if self.is_pointer:
            return 8
        return STRUCTS.get(self.type) or struct.calcsize(f"<{TYPES[self.type][1]}")


class Signature(NamedTuple):
    """What a kernel takes, and how many threads its __launch_bounds__ allow."""

    name: str
    parameters: tuple[Parameter, ...]
    most_threads: int


class Raw(NamedTuple):
    """An address that is passed as it stands: where a view is no contiguous array and the kernel knows."""

    address: int


def read_signatures(text: str) -> dict[str, Signature]:
    """Every `extern "C" __global__` function of a CUDA source. Raises ValueError for a type that is not known here."""
    text = COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    constants = dict(CONSTANT.findall(text))
    found = {}
    for bounds, name, parameters in KERNEL.findall(text):
        declared = tuple(_parameter(p, name) for p in parameters.split(",") if p.strip())
        limit = constants.get(bounds, bounds) or str(MOST_THREADS)
        if not limit.isdecimal():
            raise ValueError(
                f"kernel {name}: __launch_bounds__({bounds}): write a number, or a constexpr int of this file"
            )
        found[name] = Signature(name, declared, int(limit))
    return found


def _parameter(declaration: str, kernel: str) -> Parameter:
    words = declaration.replace("*", " * ").replace("__restrict__", " ").split()
    name, words = words[-1], words[:-1]
    is_const = "const" in words
    type_name = " ".join(word for word in words if word not in ("const", "*"))
    if words.count("*") > 1 or "[" in name or (type_name not in TYPES and type_name not in STRUCTS):
        raise ValueError(
            f"kernel {kernel}: parameter {declaration.strip()!r} is of a type that a launch cannot check; known are "
            f"{', '.join([*TYPES, *STRUCTS])} and pointers to them"
        )
    return Parameter(name, type_name, "*" in words, is_const)


@dataclass(frozen=True, eq=False)
class CudaFile:
    """The gpu.cu beside a gpu.py, and the kernels that are launched from it."""

    beside: str  # __file__ of the gpu.py
    name: str = "gpu.cu"
    kernels: dict[str, CudaKernel] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        return Path(self.beside).with_name(self.name)

    @cached_property
    def signatures(self) -> dict[str, Signature]:
        return read_signatures(self.path.read_text(encoding="utf-8"))

    def kernel(
        self, name: str, *, block: int, variants: Sequence[Mapping[str, Any]] = ({},),
        storage: Sequence[str] = tuple(STORAGE),
    ) -> CudaKernel:  # fmt: skip
        """The kernel `name`, run by blocks of `block` threads.

        `variants` are the -D's that it is compiled with, `storage` the dtypes that its `Storage` may be.
        """
        if name not in self.signatures:
            raise ValueError(
                f"{self.path} has no kernel {name!r}; it has {', '.join(self.signatures) or 'none'}. "
                'Kernels are written extern "C" __global__ void __launch_bounds__(N) name(...)'
            )
        signature = self.signatures[name]
        if not 0 < block <= signature.most_threads:
            raise ValueError(f"kernel {name}: a block of {block} threads, but it allows {signature.most_threads}")
        made = CudaKernel(self, signature, block, tuple(dict(v) for v in variants), tuple(storage))
        self.kernels[name] = made
        return made


@dataclass(frozen=True, eq=False)
class CudaKernel:
    """A kernel, ready to be launched on whichever device its arrays are on."""

    file: CudaFile
    signature: Signature
    block: int
    variants: tuple[Mapping[str, Any], ...]
    storage: tuple[str, ...]

    def __call__(
        self, *arguments: Any, grid: int | Sequence[int], shared: int = 0, on: Any = None, **defines: Any
    ) -> None:
        """Launch `grid` blocks with `shared` bytes of dynamic shared memory, on the device of the first array or `on`.

        Raises TypeError for a wrong argument.
        """
        name = self.signature.name
        device = on if on is not None else next((a.device for a in arguments if hasattr(a, "device")), None)
        if device is None:
            raise TypeError(f"kernel {name}: no argument is a device array: say where to launch, on=x.device")
        if defines not in self.variants:
            raise TypeError(f"kernel {name}: no variant {defines}; declared are {self.variants}")
        if 0 in (tuple(grid) if isinstance(grid, Sequence) else (grid,)):
            return
        packed, storage = self.pack(arguments)
        blocks = _blocks(name, grid)
        if not _is_whole(shared) or shared < 0:
            raise TypeError(f"kernel {name}: shared is a number of bytes, got {shared!r}")
        if storage is not None:
            if storage not in self.storage:
                raise TypeError(f"kernel {name} is for arrays of {', '.join(self.storage)}: not {storage}")
            defines = {**defines, "STORAGE": STORAGE[storage]}
        device.launch(self, blocks, shared, packed, defines)

    def pack(self, arguments: Sequence[Any]) -> tuple[list[bytes], str | None]:
        """The arguments as the kernel takes them, and the dtype of those that are `Storage`."""
        name, parameters = self.signature.name, self.signature.parameters
        if len(arguments) != len(parameters):
            raise TypeError(
                f"kernel {name} takes {len(parameters)} arguments ({', '.join(p.name for p in parameters)}), "
                f"got {len(arguments)}"
            )
        storage, packed = None, []
        for parameter, argument in zip(parameters, arguments, strict=True):
            if parameter.is_pointer:
                packed.append(_pointer(name, parameter, argument))
                if parameter.type == "Storage" and argument is not None and not isinstance(argument, Raw):
                    if storage not in (None, argument.dtype.name):
                        raise TypeError(
                            f"kernel {name}: {parameter.name} is {argument.dtype}, but the Storage before it {storage}"
                        )
                    storage = argument.dtype.name
            else:
                packed.append(_scalar(name, parameter, argument))
        return packed, storage


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _blocks(kernel: str, grid: Any) -> tuple[int, int, int]:
    """A grid as given -> its blocks in x, y and z."""
    given = tuple(grid) if isinstance(grid, Sequence) else (grid,)
    right = 1 <= len(given) <= 3 and all(map(_is_whole, given))
    if not right or any(not 0 <= n <= most for n, most in zip(given, MOST_BLOCKS, strict=False)):
        most = ", ".join(map(str, MOST_BLOCKS))
        raise TypeError(f"kernel {kernel}: grid is one to three numbers of blocks, at most {most}, got {grid!r}")
    x, y, z = (*map(int, given), 1, 1)[:3]
    return x, y, z


def _pointer(kernel: str, parameter: Parameter, argument: Any) -> bytes:
    if argument is None:
        return bytes(8)
    if isinstance(argument, Raw):
        return struct.pack("<Q", argument.address)
    expected = TYPES[parameter.type][0]
    if not hasattr(argument, "address"):
        raise TypeError(
            f"kernel {kernel}: {parameter.name} is a pointer: expected a device array, got {type(argument).__name__}"
        )
    if argument.dtype.name not in expected:
        raise TypeError(f"kernel {kernel}: {parameter.name} takes {' or '.join(expected)}, got {argument.dtype}")
    if not argument.is_contiguous:
        raise TypeError(f"kernel {kernel}: {parameter.name} must be contiguous: pass contiguous({parameter.name})")
    return struct.pack("<Q", argument.address)


def _scalar(kernel: str, parameter: Parameter, argument: Any) -> bytes:
    if parameter.type in STRUCTS:
        if not isinstance(argument, bytes) or len(argument) != STRUCTS[parameter.type]:
            raise TypeError(f"kernel {kernel}: {parameter.name} takes {parameter.type} as bytes, got {argument!r:.80}")
        return argument
    form = TYPES[parameter.type][1]
    if not (_is_whole(argument) or (form == "f" and isinstance(argument, float | np.floating))):
        raise TypeError(f"kernel {kernel}: {parameter.name} takes {parameter.type}, got {type(argument).__name__}")
    try:
        return struct.pack(f"<{form}", argument)
    except (struct.error, OverflowError) as error:
        raise TypeError(f"kernel {kernel}: {parameter.name} = {argument} is no {parameter.type}: {error}") from None


# -------------------------------------------------------------------------------------------- what every gpu.py needs


def contiguous(x: Array, shape: tuple[int, ...] | None = None, name: str = "an array") -> Array:
    """`x`, laid out row by row; raises ValueError where it has not the `shape` that the kernel will index by."""
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"expected {name} of shape {tuple(shape)}, got {tuple(x.shape)}")
    return x.contiguous()


def int32(x: Array) -> Array:
    """Indices as the kernels take them; converted on the host, where uploaded integers are known."""
    if x.dtype.name == "int32":
        return x.contiguous()
    host = x.host if x.host is not None else x.device.numpy(x)
    return x.device.asarray(host, dtype=np.int32)


def on_host(x: Array) -> np.ndarray:
    """Integers that a launch depends on; known without waiting for the device if they came from the host."""
    known = x.host
    return known if known is not None else x.device.numpy(x)


def blocks_for(items: int, per_block: int, device: Any) -> int:
    """How many blocks to launch for a grid-stride loop over `items`, `per_block` of them at a time."""
    return min(-(-items // per_block), WAVES * device.multiprocessors)


def cuda_stream(stream: Stream | tuple[Any, ...]) -> bytes:
    """The struct Stream of gpu_common.cuh: four words, where a graph reads the step from or null, the first block."""
    seed, number, step, layer = stream
    return struct.pack("<4IQI4x", seed, number, int(step), layer, getattr(step, "address", 0), first_block(stream))


def families() -> Iterator[Path]:
    """Every gpu.py of the kernels."""
    return iter(sorted(KERNELS.glob("*/gpu.py")))
