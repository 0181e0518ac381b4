"""Arrays whose ends touch memory that may not be touched: for a process in which a kernel is tried.

Every array that NumPy or compiled Numba code makes after `install` lies alone, its last element (or its first) at the
border of a page, with at least `SLOT` bytes around it that nothing may access. Its memory is never used again: once it
is freed, nothing may access it either. An access to such memory ends the process; what it was, and which arrays there
were, stands in shared memory for whoever started the process (`Notes`).

The functions that NumPy, Numba and the system call are compiled, so that they run in threads without the interpreter's
lock and while an exception is raised. They know where everything lies, since addresses are fixed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import platform
import signal
import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core.registry import cpu_target
from numba.core.runtime import _nrt_python, rtsys
from numba.extending import intrinsic

from minibert.kernels.cpu.jit import address_for_c, inline
from minibert.kernels.cpu.team import add, load, store

WORDS = 0x2F0000000000  # the words below and a record for each slot; they are in shared memory
ARENA = 0x300000000000
ARENA_BYTES = 1 << 43
SLOT = 1 << 20  # an array begins in a slot of its own; as many bytes as it has, and a slot at least, are kept free
RECORD, RECORDS = 4, 512  # words of one, and where the first begins
NOTE_BYTES = 8 * (RECORDS + RECORD * (ARENA_BYTES // SLOT))
PAGE = mmap.PAGESIZE

# Words: what `install` and `place` say; what the handler of a signal notes.
NEXT, AT_START, FILL, MMAP, MPROTECT, MEMSET, MEMCPY, MANAGE, FREE, TOLD = range(10)
FAULTS, SIGNAL, ADDRESS, ERROR = range(16, 20)
# Words of a record: where an array lies, of how many bytes, whether it is still there, and who made it.
START, LENGTH, STATE, MAKER = range(RECORD)
LIVE, FREED = 1, 2
BY_NUMPY, BY_NUMBA = 1, 2

NO_ACCESS, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
ANYWHERE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0) | getattr(mmap, "MAP_NORESERVE", 0x4000)
FIXED, FIXED_NOREPLACE = 0x10, 0x100000  # of Linux's <asm-generic/mman-common.h>
SIGINFO, ONSTACK, NODEFER = 0x4, 0x08000000, 0x40000000  # SA_ of <asm-generic/signal-defs.h>
# siginfo_t.si_addr, and REG_ERR of an x86-64's ucontext_t, whose bit 1 says that it was a write
INFO_ADDRESS, CONTEXT_ERROR = 16, 40 + 8 * 19
HAS_ERROR = platform.machine() in ("x86_64", "AMD64")

I64 = ir.IntType(64)


class GuardedArray(NamedTuple):
    """An array that a process had: where it lay, of how many bytes, whether it was freed, and who made it."""

    start: int
    length: int
    freed: bool
    by_numba: bool  # else by NumPy


class Fault(NamedTuple):
    """An access that ended a process."""

    signal: int
    address: int
    writes: bool | None  # None where the processor's word on it is not read


class Notes:
    """What a process with guarded arrays noted, for it and for whoever started it, on a file in shared memory."""

    def __init__(self, file: int) -> None:
        self._map = mmap.mmap(file, NOTE_BYTES)
        self.words = np.frombuffer(self._map, np.int64)

    def place(self, *, at_start: bool, fill: int) -> None:
        """Arrays made from here on begin at the border of a page, or end there; unwritten bytes hold `fill`."""
        self.words[AT_START], self.words[FILL] = at_start, fill

    def fault(self) -> Fault | None:
        """The access that ended the process, if one did."""
        if not self.words[FAULTS]:
            return None
        writes = bool(self.words[ERROR] & 2) if HAS_ERROR else None
        return Fault(int(self.words[SIGNAL]), int(self.words[ADDRESS]), writes)

    def nearest(self, address: int) -> GuardedArray | None:
        """The array that lies nearest to an address; None where that is nowhere near any."""
        if not ARENA <= address < ARENA + ARENA_BYTES:
            return None
        used = (int(self.words[NEXT]) - ARENA) // SLOT
        records = self.words[RECORDS : RECORDS + RECORD * used].reshape(-1, RECORD)
        slot = min((address - ARENA) // SLOT, used - 1)
        begun = np.flatnonzero(records[: slot + 1, STATE])[-1:]
        after = slot + 1 + np.flatnonzero(records[slot + 1 :, STATE])[:1]
        arrays = [
            GuardedArray(int(r[START]), int(r[LENGTH]), r[STATE] == FREED, r[MAKER] == BY_NUMBA)
            for r in records[[*begun, *after]]
        ]
        return min(arrays, key=lambda a: max(a.start - address, address - a.start - a.length + 1), default=None)


# ------------------------------------------------------------------------------------------------ compiled, called by C


@intrinsic
def call(typing_context: Any, function: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> Any:
    """A C function by its address, with integers or pointers; it takes no notice of those that it does not have."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], ir.FunctionType(I64, [I64] * 6).as_pointer())
        return builder.call(pointer, args[1:])

    return types.int64(*(types.int64,) * 7), generate


@inline
def allocate(size: int, maker: int, zeroed: bool) -> int:
    """The address of an array of its own; its memory holds FILL, else zeros. 0 where there is no more."""
    whole = -(-size // PAGE) * PAGE
    slots = max(1, -(-whole // SLOT))
    slot = add(WORDS, NEXT, 2 * slots * SLOT)
    if slot + 2 * slots * SLOT > ARENA + ARENA_BYTES:
        return 0
    if whole and call(load(WORDS, MPROTECT), slot, whole, READ_WRITE, 0, 0, 0):
        return 0
    if whole and not zeroed:
        call(load(WORDS, MEMSET), slot, load(WORDS, FILL), whole, 0, 0, 0)
    address = slot if load(WORDS, AT_START) else slot + whole - size
    record = RECORDS + RECORD * ((slot - ARENA) // SLOT)
    store(WORDS, record + START, address)
    store(WORDS, record + LENGTH, size)
    store(WORDS, record + MAKER, maker)
    store(WORDS, record + STATE, LIVE)
    return address


@inline
def free(address: int) -> int:
    """Nothing may access this array from now on, and its memory goes back to the system."""
    number = (address - ARENA) // SLOT
    while load(WORDS, RECORDS + RECORD * number + START) != address:  # one at the end of several slots
        number -= 1
    record = RECORDS + RECORD * number
    slot, whole = ARENA + number * SLOT, -(-load(WORDS, record + LENGTH) // PAGE) * PAGE
    store(WORDS, record + STATE, FREED)
    if whole:
        call(load(WORDS, MMAP), slot, whole, NO_ACCESS, ANYWHERE | FIXED, -1, 0)
    return load(WORDS, record + LENGTH)


def numpy_malloc(context: int, size: int) -> int:
    return allocate(size, BY_NUMPY, False)


def numpy_calloc(context: int, count: int, size: int) -> int:
    return allocate(count * size, BY_NUMPY, True)


def numpy_realloc(context: int, old: int, size: int) -> int:
    new = allocate(size, BY_NUMPY, False)
    if new and old:
        number = (old - ARENA) // SLOT
        while load(WORDS, RECORDS + RECORD * number + START) != old:
            number -= 1
        call(load(WORDS, MEMCPY), new, old, min(size, load(WORDS, RECORDS + RECORD * number + LENGTH)), 0, 0, 0)
        free(old)
    return new


def numpy_free(context: int, address: int, size: int) -> int:
    return free(address) if address else 0


def numba_allocate(size: int, alignment: int) -> int:
    """NRT_MemInfo_alloc_aligned(size, alignment): an owner of memory, which it frees when nobody holds it any more."""
    address = allocate(size, BY_NUMBA, False)
    return call(load(WORDS, MANAGE), address, load(WORDS, FREE), 0, 0, 0, 0) if address else 0


def numba_free(address: int) -> int:
    return free(address)


def note_fault(number: int, info: int, context: int) -> int:
    """Handler of SIGSEGV and SIGBUS: notes the first, and lets Python's faulthandler say where it is and end it all."""
    if add(WORDS, FAULTS, 1) == 0:
        store(WORDS, SIGNAL, number)
        store(WORDS, ADDRESS, load(info + INFO_ADDRESS, 0))
        store(WORDS, ERROR, load(context + CONTEXT_ERROR, 0) if HAS_ERROR else 0)
    call(load(WORDS, TOLD), number, 0, 0, 0, 0, 0)
    return 0


# ------------------------------------------------------------------------------------------------------------ installed


class _Handler(ctypes.Structure):
    """PyDataMem_Handler of NumPy's C API (NEP 49)."""

    _fields_ = [
        ("name", ctypes.c_char * 127), ("version", ctypes.c_uint8), ("context", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("malloc", "calloc", "realloc", "free")),
    ]  # fmt: skip


class _SignalAction(ctypes.Structure):
    """struct sigaction of Linux, with glibc or musl."""

    _fields_ = [
        ("handler", ctypes.c_void_p), ("mask", ctypes.c_uint64 * 16), ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]  # fmt: skip


_kept: list[Any] = []  # what C holds addresses of


def unavailable() -> str:
    """Why arrays cannot be guarded on this system; empty where they can."""
    if not sys.platform.startswith("linux"):
        return f"guarded memory is made with Linux's mmap, and this is {platform.system()}"
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return "guarded memory needs addresses of 64 bits"
    return ""


def install(file: int) -> Notes:
    """Guard every array made from here on in this process; notes go to a file in shared memory of `NOTE_BYTES`.

    Raises OSError where the system does not give the addresses.
    """
    _reserve(WORDS, NOTE_BYTES, READ_WRITE, mmap.MAP_SHARED, file)
    _reserve(ARENA, ARENA_BYTES, NO_ACCESS, ANYWHERE, -1)
    notes = Notes(file)
    libc = ctypes.CDLL(None)
    for word, name in ((MMAP, "mmap"), (MPROTECT, "mprotect"), (MEMSET, "memset"), (MEMCPY, "memcpy")):
        notes.words[word] = _address(getattr(libc, name))
    notes.words[NEXT] = ARENA + SLOT
    _guard_numba(notes)
    _guard_numpy()
    _note_faults(notes)
    return notes


def _reserve(address: int, size: int, access: int, kind: int, file: int) -> None:
    function = ctypes.CDLL(None, use_errno=True).mmap
    function.restype = ctypes.c_void_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    got = function(address, size, access, kind | FIXED_NOREPLACE, file, 0)
    if got != address:
        raise OSError(f"the system gives no {size >> 30} GiB of addresses at {address:#x} (ulimit -v?)")


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _guard_numba(notes: Notes) -> None:
    """Let compiled code get its arrays here: it finds the runtime's functions by their names when it is loaded."""
    rtsys.initialize(cpu_target.target_context)
    api = ctypes.cast(_nrt_api(), ctypes.POINTER(ctypes.c_void_p))
    notes.words[MANAGE] = api[2] or 0  # manage_memory, of nrt_external.h
    notes.words[FREE] = address_for_c(numba_free, 1)
    allocate_aligned = address_for_c(numba_allocate, 2)
    for name in ("NRT_MemInfo_alloc_aligned", "NRT_MemInfo_alloc_safe_aligned"):
        binding.add_symbol(name, allocate_aligned)


@cache
def _nrt_api() -> int:
    function = ctypes.CFUNCTYPE(ctypes.c_void_p)(_nrt_python.c_helpers["get_api"])
    return function() or 0


def _guard_numpy() -> None:
    handler = _Handler(b"minibert guard pages", 1, None)
    for name, function, count in (
        ("malloc", numpy_malloc, 2), ("calloc", numpy_calloc, 3), ("realloc", numpy_realloc, 3), ("free", numpy_free, 3)
    ):  # fmt: skip
        setattr(handler, name, address_for_c(function, count))
    label = ctypes.c_char_p(b"mem_handler")
    _kept.extend([handler, label])
    python = ctypes.pythonapi
    new, content = python.PyCapsule_New, python.PyCapsule_GetPointer
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    content.restype, content.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    api = ctypes.cast(content(np._core.multiarray._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))  # type: ignore[attr-defined]
    set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(api[304])  # PyDataMem_SetHandler
    set_handler(new(ctypes.addressof(handler), label, None))


def _note_faults(notes: Notes) -> None:
    faulthandler.enable(all_threads=True)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sigaction = ctypes.CDLL(None).sigaction
    for number in (signal.SIGSEGV, signal.SIGBUS):
        before = _SignalAction()
        sigaction(int(number), None, ctypes.byref(before))
        notes.words[TOLD] = before.handler or 0
        ours = _SignalAction(address_for_c(note_fault, 3), before.mask, SIGINFO | ONSTACK | NODEFER, before.restorer)
        sigaction(int(number), ctypes.byref(ours), None)
