"""What ended a process in which a kernel was tried, in words: an access, a signal or an exit, and where it was."""

from __future__ import annotations

import linecache
import os
import re
import signal
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from minibert.kernels import Op
from minibert.kernels.array_module import numpy_module
from minibert.kernels.op import input_name, outputs
from minibert.lab.conform.guarded_process import GuardedProcess, Stopped
from minibert.lab.conform.jobs import Given, Job
from minibert.lab.conform.raised import is_writers

if TYPE_CHECKING:
    from minibert.kernels.cpu.guard_pages import Fault, GuardedArray

LOOK_AGAIN_SECONDS = 30.0
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)  # as faulthandler writes it


def what_ended(process: GuardedProcess, op: Op, one: Given | None, addresses: Sequence[int]) -> str:
    """`writes 1 element past the end of x (...)`, where the kernel had been called on arrays at these addresses."""
    status, said, fault = process.status(), process.said(), process.notes.fault()
    if fault is not None and one is not None:
        return _access(fault, process.notes.nearest(fault.address), op, one, addresses)
    if status < 0:
        first = next((line for line in said.splitlines() if line.strip()), "no word")  # as "malloc(): invalid size"
        return f"ended the process by {signal.Signals(-status).name}: {first}"
    return f"ended the process with exit status {status}"


def _access(fault: Fault, array: GuardedArray | None, op: Op, one: Given, addresses: Iterable[int]) -> str:
    does = {True: "writes", False: "reads", None: "reads or writes"}[fault.writes]
    if array is None:
        return f"{does} at address {fault.address:#x}, where no array lies"
    arrays, params = one
    owned = (k for k, a in enumerate(addresses) if array.start <= a <= array.start + array.length)
    number = next(owned, None)
    if number is not None:
        mine = arrays[number]
        item, what = mine.itemsize, input_name(op, number)
        what += f" ({mine.size} element{'s'[: mine.size != 1]} of {mine.dtype}, shape {mine.shape})"
    else:
        item, what = arrays[0].itemsize, f"an array of {array.length} bytes that the kernel made"
        shapes = (np.shape(r) for r in outputs(op.formula(numpy_module, *arrays, **params)))
        alike = next((shape for shape in shapes if prod(shape) * item == array.length), None)
        what += f", as large as a result of shape {alike}" if alike is not None else ""
    past, before = fault.address - array.start - array.length, array.start - fault.address
    if past < 0 and before <= 0:
        return f"{does} {what}, which {'had been freed' if array.freed else 'it may not'}"
    far = past // item + 1 if past >= 0 else -(-before // item)
    return f"{does} {far} element{'s'[: far != 1]} {'past the end' if past >= 0 else 'before the start'} of {what}"


def index_beyond(job: Job) -> str:
    """Where an index lies beyond its array in the one call of the job, as Numba's bounds check has it; else nothing.

    In another process, which compiles the kernel with such checks.
    """
    try:
        with GuardedProcess(bounds=True) as process:
            process.send(job)
            while (event := process.event(LOOK_AGAIN_SECONDS))[0] not in ("bounds", "end"):
                pass
    except Stopped:
        return ""
    if event[0] == "end":
        return ""
    file, line, index, size, axis = event[1:]
    index -= size if index < 0 else 0  # Numba has added it
    source = linecache.getline(file, line).strip()
    return f": index {index} of axis {axis}, which has {size}, at {os.path.relpath(file)}:{line}: {source}"


def writers_frame(said: str) -> str:
    """`, at mine.py:7: in softmax`: the innermost of the writer's own lines that a process was at when it ended."""
    for file, line, name in FRAME.findall(said):
        if is_writers(file):
            return f", at {os.path.relpath(file)}:{line}: in {name}"
    return ""
