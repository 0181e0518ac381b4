"""CUDA C compiled by NVRTC, for any GPU, on machines with and without one.

NVRTC is called through ctypes: CuPy compiles only where a driver runs, forgets included headers in its cache's key and
adds flags of its own. Here the compiled code is kept on disk under everything that it depends on, and what the
assembler says about each kernel (registers, stack, spills, static shared memory) is read from its log.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from minibert import kernels
from minibert.backends.base import BackendUnavailable
from minibert.errors import UserError, pip_install
from minibert.kernels.cache import cache_base, is_own, own_folder

KERNELS = Path(kernels.__file__).resolve().parent
FLAGS = ("-std=c++17", "-lineinfo", "--ptxas-options=-v")  # and nothing that makes arithmetic less accurate
HEADERS = ("cuda_fp16.h", "cuda_bf16.h")
CACHE_DAYS = 30  # code that nothing has asked for so long is removed
MOST_MESSAGES = 5  # errors of one compilation that are shown

ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)[af]?")
MESSAGE = re.compile(r"^(.+)\((\d+)\): (?:catastrophic )?(error|warning)(?: #[\w-]+)?: (.*)$", re.M)
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


class Resources(NamedTuple):
    """What one thread of a kernel takes, and each block's static shared memory; from the assembler's log."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int

    @property
    def spill_bytes(self) -> int:
        return self.spill_store_bytes + self.spill_load_bytes


class Compiled(NamedTuple):
    """One CUDA file, compiled for one architecture with one set of -D's."""

    image: bytes  # a cubin (sm_XX) or PTX (compute_XX)
    path: Path | None  # the same on disk; None where nothing can be kept
    resources: dict[str, Resources]  # by kernel; empty for PTX, which no assembler has seen
    functions: dict[str, Resources]  # of device functions that were called, not inlined; by mangled name
    warnings: tuple[str, ...]  # "FILE:LINE: message"
    from_disk: bool


class Toolkit(NamedTuple):
    """An NVRTC and the CUDA headers that belong to it."""

    library: ctypes.CDLL
    path: Path
    version: tuple[int, int]
    include: tuple[Path, ...]

    def describe(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]} ({self.path})"


# ------------------------------------------------------------------------------------------------------ finding NVRTC


def available() -> str | None:
    """None where kernels can be compiled here, else what is missing and how to get it."""
    try:
        toolkit()
    except BackendUnavailable as error:
        return str(error)
    return None


@cache
def toolkit(newest: int | None = None) -> Toolkit:
    """The first NVRTC found that has its headers; of CUDA `newest` or older (what a driver can load), if given.

    Raises BackendUnavailable, saying what to install.
    """
    problems = []
    for path, folders in _places():
        include = tuple(folder for folder in folders if folder.is_dir())
        missing = [name for name in HEADERS if not any((folder / name).is_file() for folder in include)]
        if missing:
            problems.append(f"{path} has no {missing[0]} beside it")
            continue
        try:
            for builtins in sorted(path.parent.glob("libnvrtc-builtins.so*")):  # NVRTC looks for it by name only
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            library = _declared(ctypes.CDLL(str(path)))
        except (OSError, AttributeError) as error:  # AttributeError: a function is not there
            problems.append(f"{path} does not load: {error}")
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        if newest is None or major.value <= newest:
            return Toolkit(library, path, (major.value, minor.value), include)
        problems.append(f"{path} is of CUDA {major.value}, and the driver loads code up to CUDA {newest}")
    why = "; ".join(problems) or "no NVRTC here"
    raise BackendUnavailable(f"CUDA kernels cannot be compiled: {why}; {pip_install('[nvrtc]')}")


def _places() -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """Each libnvrtc on this machine, and where its headers would be: NVIDIA's wheels first, then toolkits."""
    wheels = find_spec("nvidia")
    for root in map(Path, (wheels and wheels.submodule_search_locations) or ()):
        for folder in sorted(root.glob("cu[0-9]*"), reverse=True):  # CUDA 13: one folder for all wheels
            yield from ((path, (folder / "include",)) for path in _libraries(folder / "lib"))
        parts = ("cuda_runtime", "cuda_nvrtc", "cuda_nvcc", "cuda_cccl")  # CUDA 12: one for each
        for path in _libraries(root / "cuda_nvrtc" / "lib"):
            yield path, tuple(root / part / "include" for part in parts)
    compiler = shutil.which("nvcc")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")]
    homes += [str(Path(compiler).resolve().parent.parent)] if compiler else []
    for home in (Path(home) for home in (*homes, "/usr/local/cuda") if home):
        for root in (home, *sorted(home.glob("targets/*"))):
            for path in (*_libraries(root / "lib64"), *_libraries(root / "lib")):
                yield path, (root / "include", home / "include", *sorted(home.glob("targets/*/include")))
    if named := ctypes.util.find_library("nvrtc"):
        yield Path(named), (Path("/usr/include"),)


def _libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("libnvrtc.so*"))


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library, its functions told what they take: a pointer cut to 32 bits would crash."""
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.nvrtcGetErrorString.restype = text
    library.nvrtcCreateProgram.argtypes = [pointer, text, text, ctypes.c_int, pointer, pointer]
    library.nvrtcCompileProgram.argtypes = [pointer, ctypes.c_int, pointer]
    for name in ("ProgramLog", "CUBIN", "PTX"):
        getattr(library, f"nvrtcGet{name}Size").argtypes = [pointer, pointer]
        getattr(library, f"nvrtcGet{name}").argtypes = [pointer, pointer]
    return library


# ---------------------------------------------------------------------------------------------------------- compiling


def compile_kernels(
    path: Path, defines: Mapping[str, Any], arch: str, *, strict: bool = False, newest: int | None = None
) -> Compiled:
    """Compile a .cu file for `arch`: a cubin for "sm_90", PTX for "compute_90". Threads may call this at once.

    strict: a * b + c is rounded twice, as in the formulas (--fmad=false). newest: see `toolkit`.
    Raises UserError with file and line where the source is wrong, BackendUnavailable where there is no NVRTC.
    """
    tools = toolkit(newest)
    check_architecture(tools, arch)
    path = path.resolve()
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    include = (KERNELS, KERNELS / "gpu", path.parent, *tools.include)
    # `float` is what gpu_common.cuh takes where nothing is said: said here, both ways share their code
    named = {"STORAGE": "float", **{name: int(v) if isinstance(v, bool) else v for name, v in defines.items()}}
    options = [f"--gpu-architecture={arch}", *FLAGS, *(["--fmad=false"] if strict else [])]
    options += [f"-D{name}={named[name]}" for name in sorted(named)]
    options += [f"-I{folder}" for folder in include]
    suffix = ".cubin" if arch.startswith("sm") else ".ptx"
    kept = _kept(cache_key(path, source, options, tools), suffix)
    found = _read(kept)
    image, log = found or _compile(tools, path, source, options, "CUBIN" if suffix == ".cubin" else "PTX")
    if kept is not None and found is None:
        kept = kept if _write(kept, image, log) else None
    warnings = tuple(f"{file}:{line}: {text}" for file, line, kind, text in MESSAGE.findall(log) if kind == "warning")
    entries, functions = read_log(log)
    return Compiled(image, kept, entries, functions, warnings, found is not None)


def check_architecture(tools: Toolkit, arch: str) -> None:
    """Raise UserError unless this NVRTC compiles for `arch`."""
    count = ctypes.c_int()
    tools.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    tools.library.nvrtcGetSupportedArchs(numbers)
    named = ARCHITECTURE.fullmatch(arch)
    if named is None or int(named[2]) not in list(numbers):
        known = ", ".join(f"sm_{number}" for number in numbers)
        raise UserError(f"{tools.describe()} does not know {arch!r}; it knows {known}, and compute_... for PTX")


def _compile(tools: Toolkit, path: Path, source: bytes, options: list[str], kind: str) -> tuple[bytes, str]:
    """The compiled code and the compiler's log."""
    library, program = tools.library, ctypes.c_void_p()
    code = library.nvrtcCreateProgram(ctypes.byref(program), source, str(path).encode(), 0, None, None)
    if code:
        raise UserError(f"{path}: NVRTC: {library.nvrtcGetErrorString(code).decode()}")
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = library.nvrtcCompileProgram(program, len(options), given)
        log = _fetch(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            raise UserError(_explained(path, log) or f"{path}: NVRTC: {library.nvrtcGetErrorString(code).decode()}")
        return _fetch(library, program, kind), log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw[: size.value]


def _explained(path: Path, log: str) -> str:
    """The errors in a log, a line each, as FILE:LINE: message; those of the assembler know no line."""
    found = [f"{file}:{line}: {text}" for file, line, kind, text in MESSAGE.findall(log) if kind == "error"]
    found = found or [f"{path}: {line.strip()}" for line in log.splitlines() if "error" in line] or log.split("\n")[:1]
    more = len(found) - MOST_MESSAGES
    return "\n".join([*found[:MOST_MESSAGES], *([f"... and {more} more errors"] if more > 0 else [])])


def read_log(log: str) -> tuple[dict[str, Resources], dict[str, Resources]]:
    """(kernels, called device functions): what ptxas -v says of each. A function's registers are its kernel's."""
    figures: dict[str, Resources] = {}
    entries: set[str] = set()
    name = ""
    for line in log.splitlines():
        if found := ENTRY.search(line) or FUNCTION.search(line):
            name = found[1]
            figures.setdefault(name, Resources(0, 0, 0, 0, 0))
            if found.re is ENTRY:
                entries.add(name)
        elif found := STACK.search(line):
            stack, stores, loads = map(int, found.groups())
            figures[name] = figures[name]._replace(
                stack_bytes=stack, spill_store_bytes=stores, spill_load_bytes=loads
            )  # fmt: skip
        elif found := REGISTERS.search(line):
            shared = SHARED.search(line)
            figures[name] = figures[name]._replace(
                registers=int(found[1]), shared_bytes=int(shared[1]) if shared else 0
            )  # fmt: skip
    return (
        {name: figures[name] for name in figures if name in entries},
        {name: figures[name] for name in figures if name not in entries},
    )


# -------------------------------------------------------------------------------------------------------------- cache


def cache_key(path: Path, source: bytes, options: list[str], tools: Toolkit) -> str:
    """A name for all that compiled code depends on: also every header that the file might include."""
    digest = hashlib.sha256()
    headers = {*_headers(KERNELS, "**/*"), *_headers(path.parent, "*")}
    parts = [repr((tools.version, options, str(path))).encode(), source, _cuda_headers(tools.include)]
    for header in sorted(headers):
        parts += [str(header).encode(), header.read_bytes()]
    for part in parts:
        digest.update(f"{len(part)}\0".encode() + part)
    return digest.hexdigest()


def _headers(folder: Path, pattern: str) -> list[Path]:
    return [path for suffix in (".cuh", ".h") for path in folder.glob(pattern + suffix)]


@cache
def _cuda_headers(include: tuple[Path, ...]) -> bytes:
    """A digest of the CUDA headers that kernels include: a wheel of headers is updated apart from NVRTC's."""
    digest = hashlib.sha256()
    for folder in include:
        for pattern in ("cuda_fp16.h*", "cuda_bf16.h*"):
            for path in sorted(folder.glob(pattern)):
                digest.update(path.read_bytes())
    return digest.digest()


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return cache_base() / "cuda"


@cache
def _prepared(folder: Path) -> bool:
    """Make the folder and remove from it what is long unused, once in a process; False where it cannot be written."""
    try:
        own_folder(folder)
        oldest = time.time() - CACHE_DAYS * 86400
        for path in folder.iterdir():
            with suppress(OSError):  # another process removes it too
                if path.stat().st_mtime < oldest:
                    path.unlink()
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _kept(key: str, suffix: str) -> Path | None:
    try:
        folder = cache_folder()
    except RuntimeError:  # no home directory
        return None
    return folder / f"{key}{suffix}" if _prepared(folder) else None


def _read(kept: Path | None) -> tuple[bytes, str] | None:
    """What lies on disk, if it is whole: the log's first line is the digest of the code beside it."""
    if kept is None:
        return None
    try:
        if not all(is_own(path) for path in (kept, kept.with_suffix(".log"))):
            return None
        image = kept.read_bytes()
        digest, _, log = kept.with_suffix(".log").read_text(encoding="utf-8").partition("\n")
        if digest != hashlib.sha256(image).hexdigest():
            return None
        for path in (kept, kept.with_suffix(".log")):
            os.utime(path)
    except (OSError, ValueError):  # ValueError: a log that is no text
        return None
    return image, log


def _write(kept: Path, image: bytes, log: str) -> bool:
    """Both files appear at once or not at all, whoever else writes them."""
    text = f"{hashlib.sha256(image).hexdigest()}\n{log}".encode()
    try:
        for path, content in ((kept, image), (kept.with_suffix(".log"), text)):
            fresh = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_native_id()}")
            fresh.write_bytes(content)
            fresh.replace(path)
    except OSError:
        return False
    return True
