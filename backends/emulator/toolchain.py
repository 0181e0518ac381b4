"""g++ for the emulator: its own program, and kernels as shared libraries, both kept in the user's cache.

A .cu file goes through the preprocessor first, with the shim (include/cuda_emulator.h) before it. In what comes out,
`__global__` tells the kernels, `__shared__` is given its place, and what the emulator does not know is refused with
its line. Only then is it compiled; line numbers stay those of the source.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from minibert.backends.base import BackendUnavailable
from minibert.errors import UserError, warn
from minibert.kernels.cache import cache_base, is_own, own_folder

INCLUDE = Path(__file__).parent / "include"
RUNTIME = Path(__file__).parent / "runtime"

LANGUAGE = ["-std=gnu++17"]
KERNEL_FLAGS = [
    *("-gdwarf-4", "-fPIC"),  # of DWARF 5, addr2line 2.40 takes one file for another
    "-ffp-contract=off",  # the same bits with and without the sanitiser
    "-fno-strict-aliasing",  # device code reads floats as uint4
    "-fno-threadsafe-statics",
    "-fno-gnu-unique",  # a template's static belongs to its own library
    "-fno-finite-loops",  # a loop without an end is one here too
    "-fstack-clash-protection",  # large local arrays do not step over the guard between two threads' stacks
]
# Copies of whole structs stay whole (no scalar replacement), so that the hooks see a float4 as one access.
# Besides these (thread), the compiler calls back where an index or a pointer leaves an array that it knows, such as a
# thread's own, which lies in no watched memory, where an address is none for its type, and where a GPU gives some
# number of its own.
SANITIZED = [
    *("-O1", "-fno-tree-sra", "-fsanitize=thread"),
    "-fsanitize=bounds-strict,object-size,alignment,integer-divide-by-zero,float-cast-overflow",
    *("--param", "tsan-instrument-func-entry-exit=0"),
    *("-Wuninitialized", "-Wmaybe-uninitialized", "-fdiagnostics-plain-output"),
]
PATTERN = "-ftrivial-auto-var-init=pattern"  # variables that nobody has set hold -1.7e38: from GCC 12 on
FAST = ["-O2", "-w"]
WRAPPED = [f"-Wl,--wrap={name}" for name in ("memcpy", "memmove", "memset")]
PROGRAM_FLAGS = ["-O2", "-g"]
ROOM = 1 << 22  # bytes that the cache must take: as large as the program is, and larger than kernels are
SETTLED = 10**8  # nanoseconds after which a file that was written again has another time
UNUSED_DAYS = 30  # what nobody has asked for in so long is removed from the cache

# What the emulator does not do: a pattern in the preprocessed source, and why.
REFUSED = (
    (r"\b(?:__asm__|__asm|asm)\b", "inline PTX cannot run on a CPU: give it a twin under #ifdef CUDA_EMULATOR"),
    (r"<<<", "a launch from the device (dynamic parallelism) is not emulated"),
    (r"\bcp_async_bulk|\btma_|\bCUtensorMap\b", "TMA (cp.async.bulk) is not emulated: copy with cp.async or loads"),
    (r"\bwgmma|\bwarpgroup_", "wgmma is not emulated: use mma.sync or wmma"),
    (r"\b__cluster_dims__\b|\bclusterIdx\b|\bclusterDim\b", "thread block clusters are not emulated"),
    (r"\bgrid_group\b|\bthis_grid\b", "blocks run one after another here: no grid waits for all of its blocks"),
    (
        r"\b(?:coalesced_(?:group|threads)|thread_group|labeled_partition)\b",
        "of cooperative groups only the block and tiles of fixed size are emulated",
    ),
    (r"\bcudaTextureObject_t\b|\bcudaSurfaceObject_t\b|\btex[123]D\w*\b", "textures and surfaces are not emulated"),
    (r"\b__managed__\b", "managed variables are not emulated: pass an array"),
    (r"\bcuda::(?:barrier|pipeline|atomic|std)\b", "libcu++ is not emulated"),
)
DYNAMIC_SHARED = re.compile(
    r"\bextern\s+__shared__\s+((?:__attribute__\s*\(\([^;]*?\)\)\s+)?)((?:[\w:]+\s+)*?[\w:]+(?:\s*<[^;<>]*>)?)\s+"
    r"((?:__attribute__\s*\(\([^;]*?\)\)\s*)?)(\w+)\s*\[\s*\]\s*;"
)
KERNEL = re.compile(r"\b__global__\b([^;{}()]*(?:\([^;{}()]*\)[^;{}()]*)*?)\b(\w+)\s*\(")
INCLUDED = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">\n]+)[">]', re.M)
UNINITIALISED = re.compile(r"^(.+):(\d+):\d+: warning: .(.+). (is|may be) used uninitialized \[", re.M)
WITHIN = re.compile(r"^.+: In (?:member )?function .(?:.*[ *&])?(\w+)\(.*:$", re.M)
LINE_MARKER = re.compile(r'^# (\d+) "((?:[^"\\]|\\.)*)"((?: \d+)*)')


class Uninitialised(NamedTuple):
    """A variable that the compiler saw being read before it has a value; `certain`, or on some path only."""

    file: str
    line: int
    function: str
    variable: str
    certain: bool


def compiler() -> str:
    """The path of g++, or of what $CXX names. Raises BackendUnavailable where there is none, saying what to install."""
    if not sys.platform.startswith("linux"):
        raise BackendUnavailable(f"the emulator needs Linux, this is {sys.platform}: run it in a container")
    name = os.environ.get("CXX") or "g++"
    path = shutil.which(name)
    if path is None and name != "g++":
        raise BackendUnavailable(
            f"the emulator needs a C++ compiler, and $CXX names {name!r}, which is no program: "
            "unset CXX, or name a GCC without options"
        )
    if path is None:
        raise BackendUnavailable(
            "the emulator needs a C++ compiler, and g++ is not found: "
            "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), pacman -S gcc (Arch)"
        )
    if "clang" in _version(path):
        raise BackendUnavailable(f"the emulator needs GCC, and {path} is clang: unset CXX and install g++")
    return path


@functools.cache
def _version(path: str) -> str:
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout


def _major_version(path: str) -> int:
    versions = re.findall(r"\b(\d+)\.\d+\.\d+", _version(path).partition("\n")[0])
    return int(versions[-1]) if versions else 0


def cache_folder() -> Path:
    """Where compiled kernels are kept: in the user's cache; where that cannot be, while this process runs."""
    try:
        base = cache_base()
    except RuntimeError:  # there is no home, as in many a container
        return Path(_of_this_process().name)
    folder = _folder_in(base)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # somebody may have removed it meanwhile
    return folder


@functools.cache
def _folder_in(base: Path) -> Path:
    try:
        folder = own_folder(base / "emulator")
        with tempfile.TemporaryFile(dir=folder) as file:  # a full disk, or quota, shows in what is written
            file.write(bytes(ROOM))
            file.flush()
        return folder
    except OSError as error:
        kept = _of_this_process()
        warn(
            f"the emulator cannot keep what it compiles ({error}): it compiles anew in every process; set "
            "MINIBERT_CACHE_DIR to a folder of your own"
        )
        return Path(kept.name)


@functools.cache
def _of_this_process() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    try:
        return tempfile.TemporaryDirectory(prefix="minibert-emulator-")
    except OSError as error:
        raise BackendUnavailable(
            f"the emulator has no place for compiled kernels ({error}); set MINIBERT_CACHE_DIR to a folder"
        ) from None


def _scratch(target: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder to compile in, on the file system of `target`."""
    return tempfile.TemporaryDirectory(dir=target.parent)


def emulator_executable() -> Path:
    """The emulator's program, built when its sources or the compiler have changed."""
    path = compiler()
    flags = [*LANGUAGE, *PROGRAM_FLAGS, f"-I{INCLUDE}"]
    sources = sorted(RUNTIME.glob("*.cpp"))
    headers = [*sorted(RUNTIME.glob("*.h")), *sorted(INCLUDE.glob("*.h"))]
    target = cache_folder() / f"emulator-{_digest(path, flags, [Path(__file__), *sources, *headers])}"
    if _is_kept(target):
        return target
    _remove_unused(target.parent)
    with _scratch(target) as scratch:
        failure = "the emulator does not compile"

        def build(source: Path) -> str:
            built = f"{scratch}/{source.stem}.o"
            _run([path, *flags, "-c", "-o", built, str(source)], failure)
            return built

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(build, sources))
        # Kernels, loaded later, are to find the emulator's functions: -rdynamic.
        _run([path, "-rdynamic", "-o", f"{scratch}/emulator", *parts, "-ldl"], failure)
        _keep(Path(scratch) / "emulator", target)
    return target


def compile_kernels(source: Path, defines: Mapping[str, str], include: Sequence[Path], *, sanitize: bool) -> Path:
    """Compile a .cu file into a shared library that the emulator loads; from the cache where nothing has changed.

    `defines` are passed as -D, `include` as -I; every header that the source leads to is part of the cache's key. With
    `sanitize`, every load and store is watched.

    Raises UserError with the compiler's first errors, or with the line of what the emulator does not do.
    """
    source = source.absolute()
    asked = source, *sorted(defines.items()), *map(Path.absolute, include), sanitize, compiler(), cache_folder()
    known = _made.get(asked)
    if known is None or known.seen != _seen(known.target, known.files):
        begun = time.time_ns()
        target, files = _compiled(source, defines, include, sanitize)
        _made[asked] = known = Made(target, files, _seen(target, files, until=begun - SETTLED))
    return known.target


class Made(NamedTuple):
    """A library, and what it was made of. It is looked for at every launch, of which a check has thousands."""

    target: Path
    files: list[Path]
    seen: Any  # what `_seen` gave


_made: dict[tuple[Any, ...], Made] = {}


def _seen(target: Path, files: Sequence[Path], until: int | None = None) -> Any:
    """What tells that files are as they were, without their content; None where one was written after `until`."""
    try:
        whole, states = target.stat(), [file.stat() for file in files]
    except OSError:
        return None
    if until is not None and any(state.st_mtime_ns > until for state in states):
        return None
    return whole.st_ino, whole.st_size, [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _compiled(
    source: Path, defines: Mapping[str, str], include: Sequence[Path], sanitize: bool
) -> tuple[Path, list[Path]]:
    """The library, and what it is made of."""
    path = compiler()
    defined = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    flags = [*LANGUAGE, *KERNEL_FLAGS, *(SANITIZED if sanitize else FAST)]
    if _major_version(path) >= 12:
        flags.append(PATTERN)
    words = [str(source), *map(str, include), *defined, *flags, *WRAPPED]
    files = [source, *included(source, include), Path(__file__), *sorted(INCLUDE.rglob("*.h"))]
    target = cache_folder() / f"{source.parent.name}-{source.stem}-{_digest(path, words, files)}.so"
    if _is_kept(target):
        return target, files
    with _scratch(target) as scratch:
        where = [f"-I{INCLUDE}", *(f"-I{folder}" for folder in include), "-include", "cuda_emulator.h"]
        preprocess = [path, "-E", *LANGUAGE, *defined, *where, "-x", "c++", str(source)]
        text = translate(_run(preprocess, f"{_short(source)} does not compile for the emulator"), source)
        translated, object_file, built = (Path(scratch) / f"kernels.{suffix}" for suffix in ("ii", "o", "so"))
        translated.write_text(text, encoding="utf-8")
        build = [path, *flags, "-c", "-x", "c++-cpp-output", str(translated), "-o", str(object_file)]
        warned: list[str] = []
        _run(build, f"{_short(source)} does not compile for the emulator", warned)
        if variables := _uninitialised("".join(warned)):
            _note_for(target).write_text(json.dumps(variables), encoding="utf-8")
        # Linked apart, without -fsanitize: the hooks are the emulator's, not the thread sanitiser's own.
        link = [path, "-shared", *WRAPPED, "-o", str(built), str(object_file)]
        _run(link, f"{_short(source)} does not link for the emulator")
        _keep(built, target)
    return target, files


def _note_for(library: Path) -> Path:
    return library.with_suffix(".json")


@functools.lru_cache(maxsize=1024)
def uninitialised(library: Path) -> tuple[Uninitialised, ...]:
    """What the compiler said of a library's variables; nothing of those that are compiled without `sanitize`."""
    try:
        return tuple(Uninitialised(*told) for told in json.loads(_note_for(library).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ()


def _uninitialised(warnings: str) -> list[Uninitialised]:
    """g++'s warnings -> each variable once."""
    found: dict[tuple[str, int, str], Uninitialised] = {}
    function = ""
    for line in warnings.splitlines():
        if within := WITHIN.match(line):
            function = within[1]
        elif (told := UNINITIALISED.match(line)) and not Path(told[1]).is_relative_to(INCLUDE):
            one = Uninitialised(told[1], int(told[2]), function, told[3], told[4] == "is")
            found.setdefault((one.file, one.line, one.variable), one)
    return list(found.values())


def translate(text: str, source: Path) -> str:
    """Preprocessed CUDA C -> C++: kernels registered at the end, shared memory placed, the unknown refused."""
    _refuse_unknown(text)
    text = DYNAMIC_SHARED.sub(_place_dynamic_shared, text)
    if found := re.search(r"\bextern\s+__shared__\b[^;]*", text):
        raise UserError(
            f"{_place(text, found.start())}: expected extern __shared__ TYPE name[];, got {_one_line(found[0])!r}"
        )
    kernels = []
    for found in KERNEL.finditer(text):
        before = text[max(0, found.start() - 400) : found.start()]
        if re.search(r"\btemplate\s*<[^;{}]*>\s*$", before):
            raise UserError(
                f"{_place(text, found.start())}: kernel {found[2]} is a template; write an extern "
                '"C" kernel that calls a template'
            )
        kernels.append(found[2])
    text = re.sub(r"\b__global__\b", "__attribute__((noinline))", text)
    text = re.sub(
        r"\b(?:static\s+)?__shared__\b(?:\s+static\b)?", "static thread_local __attribute__((aligned(16)))", text
    )
    names = dict.fromkeys(kernels)  # a kernel may be declared before it is defined
    return text + "\n" + "".join(_registration(name) for name in names)


def _registration(kernel: str) -> str:
    return (
        f"__attribute__((constructor)) static void cuda_emulator_register_{kernel}() "
        f'{{ cuda_emulator::register_kernel<{kernel}>("{kernel}", {kernel}); }}\n'
    )


def _place_dynamic_shared(found: re.Match[str]) -> str:
    kind, name = found[2], found[4]
    lines = "\n" * found[0].count("\n")
    return f"{kind}* const {name} = reinterpret_cast<{kind}*>(cuda_emulator::dynamic_shared_address);{lines}"


def _refuse_unknown(text: str) -> None:
    """Look for what the emulator does not do, in lines that are neither the shim's nor the system's."""
    pattern = re.compile("|".join(f"({pattern})" for pattern, _ in REFUSED))
    file, line, foreign = "", 0, False
    for content in text.split("\n"):
        if marker := LINE_MARKER.match(content):
            file, line = marker[2], int(marker[1])
            foreign = "3" in marker[3].split() or Path(file).is_relative_to(INCLUDE)
            continue
        if not foreign and (found := pattern.search(_without_strings(content))):
            raise UserError(f"{_short(Path(file))}:{line}: {REFUSED[(found.lastindex or 1) - 1][1]}")
        line += 1


def _without_strings(line: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)


def _place(text: str, offset: int) -> str:
    """The file and line of an offset in preprocessed text."""
    before = text[:offset].split("\n")
    for back, content in enumerate(reversed(before)):
        if marker := LINE_MARKER.match(content):
            return f"{_short(Path(marker[2]))}:{int(marker[1]) + back - 1}"
    return f"line {len(before)}"


def _short(path: Path) -> str:
    """A file as messages show it: with its folder."""
    return "/".join(path.parts[-2:])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _run(command: list[str], failure: str, warned: list[str] | None = None) -> str:
    """What a program prints; what it prints as an error although it succeeds is added to `warned`."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    if done.returncode == 0:
        if warned is not None:
            warned.append(done.stderr)
        return done.stdout
    told = done.stderr.splitlines()
    errors = [line for line in told if re.search(r"\berror:|fatal|undefined reference", line)]
    silent = [f"{command[0]} ended with exit status {done.returncode} and said nothing"]
    raise UserError(f"{failure}: " + " | ".join(errors[:3] or told[:3] or silent))


def included(source: Path, folders: Sequence[Path]) -> list[Path]:
    """The headers that a source includes, and those that they include: beside the file, else in `folders`."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        file = waiting.pop()
        for name in INCLUDED.findall(file.read_text(encoding="utf-8", errors="replace")):
            header = next((h for h in (folder / name for folder in (file.parent, *folders)) if h.is_file()), None)
            if header is not None and header not in found:
                found.append(header)
                waiting.append(header)
    return found


def _digest(path: str, words: Sequence[str], files: Sequence[Path]) -> str:
    """A name for what a compiler makes of files by flags."""
    digest = hashlib.sha256("\0".join([path, _version(path), *words]).encode())
    for file in files:
        content = file.read_bytes()
        digest.update(f"\0{file.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:20]


def _keep(built: Path, target: Path) -> None:
    """Move what was built into the cache, its SHA-256 behind it: loaders of ELF files do not read so far."""
    with open(built, "ab") as file:
        file.write(hashlib.sha256(built.read_bytes()).digest())
    os.replace(built, target)


def _is_kept(target: Path) -> bool:
    """Whether the cache has it, whole and the user's own; tells that it is in use."""
    try:
        content = target.read_bytes()
    except FileNotFoundError:
        return False
    size = len(content) - hashlib.sha256().digest_size
    if not is_own(target) or hashlib.sha256(content[:size]).digest() != content[size:]:
        warn(f"{target} is damaged, or another user's: it is compiled anew")
        return False
    for path in (_note_for(target), target):
        with suppress(OSError):  # there is no note, or the cache is only read
            os.utime(path)
    return True


def _remove_unused(folder: Path) -> None:
    for kept in folder.iterdir():
        with suppress(OSError):  # another process removes it too
            if kept.is_file() and time.time() - kept.stat().st_mtime > UNUSED_DAYS * 86400:
                kept.unlink()
