"""A team of threads that wait for work in compiled code, outside of Python (fork and join).

Handing work to a thread of Python's takes 40 to 80 microseconds: each has to wake and to be given the interpreter
lock. A member of a team watches a word of memory instead, and begins within a microsecond. After a while without work
it sleeps, in `read` of a pipe, until a byte comes.

How a job is shared: the caller writes it down and makes TICKET odd, which opens it. Whoever works on it takes the next
piece by adding 1 to NEXT. The caller closes the job (an even ticket) when no piece is left, then waits until ACTIVE is
0. A member counts itself as active first and looks at the ticket again after: so either it sees that the job is closed,
or the caller sees that it is active. A member that is late finds nothing to do, and nobody waits for it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minibert.kernels.cpu.jit import address_for_c, jit

PATIENCE = 10_000  # looks for work, 20 to 50 ns each, before a member sleeps
YIELD_AFTER = 1_000  # looks for the others' end before the caller offers its core to them

# Words of a team's memory. Those that several threads write stand in cache lines of their own.
LINE = 8
TICKET, NEXT, ACTIVE, ASLEEP, FAILED, ENDED, JOB = (LINE * n for n in range(7))
CONTEXT, ROWS, PIECES = JOB + 1, JOB + 2, JOB + 3
READ, WRITE, YIELD, READ_END, WRITE_END = (7 * LINE + n for n in range(5))
BYTES = 8 * LINE  # that go through the pipe

I32, I64, POINTER = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()
RANGE = ir.FunctionType(I32, [POINTER, I64, I64])  # status = range(context, start, stop)


# --- words of memory that several threads read and write -------------------------------------------------------------


def _word(builder: ir.IRBuilder, memory: Any, index: Any) -> Any:
    return builder.gep(builder.inttoptr(memory, I64.as_pointer()), [index])


@intrinsic
def load(typing_context: Any, memory: Any, index: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_word(builder, *args), "seq_cst", 8)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def store(typing_context: Any, memory: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        builder.store_atomic(args[2], _word(builder, *args[:2]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def add(typing_context: Any, memory: Any, index: Any, value: Any) -> Any:
    """The word before `value` is added to it."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _word(builder, *args[:2]), args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


@intrinsic
def swap(typing_context: Any, memory: Any, index: Any, value: Any) -> Any:
    """The word before it becomes `value`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("xchg", _word(builder, *args[:2]), args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), generate


# --- calls by address ------------------------------------------------------------------------------------------------


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this loop waits."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        if platform.machine() in ("x86_64", "AMD64"):
            name, module = "llvm.x86.sse2.pause", builder.module
            function = module.globals.get(name) or ir.Function(module, ir.FunctionType(ir.VoidType(), []), name)
            builder.call(function, [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_range(typing_context: Any, function: Any, job: Any, start: Any, stop: Any) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], RANGE.as_pointer())
        return builder.sext(builder.call(function, [builder.inttoptr(args[1], POINTER), *args[2:]]), I64)

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call_system(typing_context: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """read(a, b, c) or write(a, b, c) of the C library; or a function that ignores them."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(I64, [I32, POINTER, I64])
        function, (a, b, c) = builder.inttoptr(args[0], kind.as_pointer()), args[1:]
        return builder.call(function, [builder.trunc(a, I32), builder.inttoptr(b, POINTER), c])

    return types.int64(types.int64, types.int64, types.int64, types.int64), generate


@intrinsic
def call_fork_join(
    typing_context: Any, function: Any, memory: Any, job: Any, job_context: Any, rows: Any, pieces: Any
) -> Any:
    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], ir.FunctionType(I64, [I64] * 5).as_pointer())
        return builder.call(function, args[1:])

    return types.int64(*(types.int64,) * 6), generate


@intrinsic
def pack_job(typing_context: Any, kernel: Any, args: Any) -> Any:
    """Addresses of a RANGE function, and of its context, for a compiled kernel at this address with these arguments.

    The context lies on the caller's stack, and the arguments remain the caller's.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> Any:
        arguments = signature.args[1]
        kinds = [*arguments.types, types.int64, types.int64]
        frame = ir.LiteralStructType([I64, context.get_value_type(arguments)])
        place = cgutils.alloca_once(builder, frame)
        for number, value in enumerate(values):
            builder.store(value, builder.gep(place, [I32(0), I32(number)]))

        function = ir.Function(builder.module, RANGE, f"{builder.function.name}.range")
        function.linkage = "internal"
        inside = ir.IRBuilder(function.append_basic_block())
        frame_pointer = inside.bitcast(function.args[0], frame.as_pointer())
        address, packed = (inside.load(inside.gep(frame_pointer, [I32(0), I32(n)])) for n in (0, 1))
        unpacked = [inside.extract_value(packed, n) for n in range(len(arguments.types))]
        kernel_type = context.call_conv.get_function_type(types.none, kinds)
        outs = []  # for the result, which is none, and for what an exception says
        for pointer in kernel_type.args[:2]:
            out = inside.alloca(pointer.pointee)
            inside.store(pointer.pointee(None), out)
            outs.append(out)
        native = context.get_arg_packer(kinds).as_arguments(inside, [*unpacked, *function.args[1:]])
        inside.ret(inside.call(inside.inttoptr(address, kernel_type.as_pointer()), [*outs, *native]))

        addresses = [builder.ptrtoint(function, I64), builder.ptrtoint(place, I64)]
        return context.make_tuple(builder, signature.return_type, addresses)

    return types.UniTuple(types.int64, 2)(types.int64, args), generate


# --- the caller and the members --------------------------------------------------------------------------------------

plumbing = partial(jit, announced=False)


@plumbing
def share(memory: int) -> None:
    """Do pieces of the job until none is left."""
    rows, pieces = load(memory, ROWS), load(memory, PIECES)
    job, context = load(memory, JOB), load(memory, CONTEXT)
    while True:
        piece = add(memory, NEXT, 1)
        if piece >= pieces:
            break
        status = call_range(job, context, rows * piece // pieces, rows * (piece + 1) // pieces)
        if status == -1 or status > 0:  # an exception; 0 and -2 are returns
            store(memory, FAILED, piece + 1)


def fork_join(memory: int, job: int, context: int, rows: int, pieces: int) -> int:
    """Have the team do all pieces; 0, or 1 more than the number of a piece that raised an exception."""
    store(memory, JOB, job)
    store(memory, CONTEXT, context)
    store(memory, ROWS, rows)
    store(memory, PIECES, pieces)
    store(memory, NEXT, 0)
    store(memory, FAILED, 0)
    ticket = load(memory, TICKET)
    store(memory, TICKET, ticket + 1)
    asleep = swap(memory, ASLEEP, 0)
    if asleep > 0:
        call_system(load(memory, WRITE), load(memory, WRITE_END), memory + 8 * BYTES, asleep)
    share(memory)
    store(memory, TICKET, ticket + 2)
    looks = 0
    while load(memory, ACTIVE) > 0:
        pause()
        looks += 1
        if looks > YIELD_AFTER:
            call_system(load(memory, YIELD), 0, 0, 0)
    return load(memory, FAILED)


@plumbing
def launch(fork_join: int, kernel: int, memory: int, rows: int, pieces: int, args: tuple[Any, ...]) -> int:
    job, context = pack_job(kernel, args)
    return call_fork_join(fork_join, memory, job, context, rows, pieces)


@plumbing
def serve(memory: int, number: int) -> None:
    """What a member does until the team ends."""
    seen = 0
    while True:
        looks = 0
        while looks < PATIENCE:
            ticket = load(memory, TICKET)
            if ticket % 2 == 1 and ticket != seen:
                add(memory, ACTIVE, 1)
                if load(memory, TICKET) == ticket:
                    share(memory)
                add(memory, ACTIVE, -1)
                seen, looks = ticket, 0
            elif load(memory, ENDED):
                return
            else:
                pause()
                looks += 1
        add(memory, ASLEEP, 1)
        call_system(load(memory, READ), load(memory, READ_END), memory + 8 * (BYTES + number), 1)


@cache
def _address_of(name: str) -> int:
    """Of a function of the C library."""
    return ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value or 0


@cache
def _fork_join_address() -> int:
    return address_for_c(fork_join, 5)


class Team:
    """So many threads beside the caller's own; fewer where the system starts no more."""

    def __init__(self, members: int) -> None:
        words = np.zeros(LINE + BYTES + LINE + members, np.int64)
        self._words = words[-(words.ctypes.data // 8) % LINE :]  # from the beginning of a cache line on
        self._memory = self._words.ctypes.data
        self._fork_join = _fork_join_address()
        self._pipe = os.pipe()
        self._words[[READ_END, WRITE_END]] = self._pipe
        self._words[[READ, WRITE, YIELD]] = [_address_of(name) for name in ("read", "write", "sched_yield")]
        self._lock = threading.Lock()
        self._running = 0
        self.identities: list[int] = []  # native ids of the threads that run
        for number in range(members):
            thread = threading.Thread(target=self._serve, args=(number,), name=f"minibert-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit, or the interpreter's end: those there are do the work
                break
            self._running += 1

    def _serve(self, number: int) -> None:
        self.identities.append(threading.get_native_id())
        serve(self._memory, number)
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self.close_pipe()

    def run(self, kernel: int, args: tuple[Any, ...], rows: int, pieces: int) -> int | None:
        """Run a compiled kernel (its address) on `pieces` ranges of [0, rows): None, or a piece that raised."""
        failed = launch(self._fork_join, kernel, self._memory, rows, pieces, args)
        return failed - 1 if failed else None

    def end(self) -> None:
        """Let the threads end, each when it has done what it does. No `run` comes after."""
        with self._lock:  # the pipe stays open
            self._words[ENDED] = 1
            if self._running:
                os.write(self._pipe[1], b"." * self._running)
            else:
                self.close_pipe()

    def close_pipe(self) -> None:
        for end in self._pipe:
            os.close(end)
