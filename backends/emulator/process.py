"""The emulator's process, seen from Python: its memory, its kernels, launches and what they found.

Device memory is one arena shared by both processes; whatever a kernel does to it, Python lives on.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from minibert.backends.base import BackendUnavailable
from minibert.backends.emulator.findings import Finding, TrafficLine, read_findings, read_traffic, without_end
from minibert.backends.emulator.toolchain import emulator_executable
from minibert.errors import UserError

BASE = 0x600000000000  # arena_address of runtime/regions.h
LOAD, LAUNCH, REGION, QUIT = range(4)
STATES = {"unwritten": 0, "freed": 1, "written": 2}
SCHEDULES = {"forward": 0, "reverse": 1, "random": 2}
RETURNED_TO_SYSTEM = 1 << 20  # freed regions of so many bytes give their memory back

SPOILT = "what arrays hold is not to be relied on"

SECONDS = "MINIBERT_EMULATOR_SECONDS"  # of computing that a small launch may take
USUAL_SECONDS = 2.0
THREADS_PER_SHARE = 10_000  # a launch of so many more, or on a device whose arrays hold
BYTES_PER_SHARE = 1 << 18  # ... so many bytes more, gets as many seconds again
AFTER_AN_ENDLESS_ONE = 0.25  # of the time, for a kernel that has once been stopped
OVERSLEPT = 30.0  # so many times what a launch may compute a busy machine may make us wait

RegionState = Literal["unwritten", "freed", "written"]


class Argument(NamedTuple):
    """A kernel's argument as the compiler saw it."""

    kind: str  # "pointer", "struct", or a scalar: "f4", "i4", "u4", "i8", ...
    bytes: int
    element: str = ""  # of a pointer: "f4", "f2" (half), "b2" (bfloat16), ...
    const: bool = False


@dataclass(frozen=True)
class Report:
    """What a launch told."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)  # no mistakes, but worth knowing
    traffic: list[TrafficLine] = field(default_factory=list)


class EmulatorCrash(RuntimeError):
    """A kernel ended the emulator's process; the next use starts another.

    Arrays stay allocated, but what they hold is not to be relied on.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = list(findings)


class DebuggerLeft(KeyboardInterrupt):
    """The user has quit gdb: like an interrupt, it ends what is being done."""


class EmulatorProcess:
    """Starts with the first use, and again after a crash.

    `base` is the arena's address for kernels, `memory` the same bytes here, as NumPy uint8 of shape (memory_bytes,).
    `timeout` bounds what a launch computes, in seconds; by default by its size (`seconds_for`). `gdb` runs the process
    under gdb, stopped at "file.cu:line"; then nothing is bounded, and gdb has the terminal.
    """

    def __init__(self, memory_bytes: int = 1 << 36, *, timeout: float | None = None, gdb: str | None = None) -> None:
        self.base = BASE
        self.timeout = timeout
        self.gdb = gdb
        self._bytes = memory_bytes
        self._seconds = seconds_asked_for()
        self._endless: set[tuple[Path, str]] = set()
        emulator_executable()  # says at once what is missing
        self._memory_fd = os.memfd_create("minibert-emulator")
        os.ftruncate(self._memory_fd, memory_bytes)
        self._map = mmap.mmap(self._memory_fd, memory_bytes)
        self.memory = np.frombuffer(self._map, np.uint8)
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._regions = bytearray()
        self._live: dict[int, int] = {}  # address -> bytes: told again to a process that takes over after a crash
        self._kernels: dict[Path, dict[str, tuple[int, list[Argument]]]] = {}
        self._finalizer = weakref.finalize(self, os.close, self._memory_fd)

    # --- device memory ---

    def region(self, address: int, nbytes: int, state: RegionState) -> None:
        """Tell that bytes are allocated and unwritten (they become NaN at once), freed, or written by the host.

        `address` is a multiple of 256, but for "written", which may name a part of an allocated region.
        """
        if nbytes == 0:
            return
        start = address - self.base
        if state == "unwritten":
            self.memory[start : start + nbytes] = 0xFF
        elif state == "freed" and nbytes >= RETURNED_TO_SYSTEM:
            first, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_REMOVE, first, end - first)
        if state == "freed":
            self._live.pop(address, None)
        elif state == "unwritten" or not self._is_live(address, nbytes):
            self._live[address] = nbytes
        self._regions += struct.pack("<QQI", address, nbytes, STATES[state])

    def _is_live(self, address: int, nbytes: int) -> bool:
        return address in self._live or any(a < address < a + size for a, size in self._live.items())

    # --- kernels ---

    def load(self, so: Path) -> dict[str, list[Argument]]:
        """The kernels of a library that `toolchain.compile_kernels` made: name -> arguments."""
        return {name: arguments for name, (_, arguments) in self._load(so).items()}

    def _load(self, so: Path) -> dict[str, tuple[int, list[Argument]]]:
        self._start()
        if so not in self._kernels:
            reply = self._ask(LOAD, os.fsencode(so), f"loading {so.name}")
            self._kernels[so] = {
                kernel["name"]: (kernel["id"], [Argument(**argument) for argument in kernel["arguments"]])
                for kernel in reply["kernels"]
            }
        return self._kernels[so]

    def launch(
        self,
        so: Path,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        arguments: Sequence[bytes],
        *,
        sanitize: bool = True,
        traffic: bool = False,
        schedule: str = "forward",
        seed: int = 0,
    ) -> Report:
        """Run a kernel of a library to its end. `arguments` are its parameters' bytes, pointers as 8 byte addresses.

        Findings and traffic need a library that was compiled with `sanitize=True`. `schedule` orders blocks, warps
        and lanes: "forward", "reverse" or "random" by `seed`.

        Raises UserError for a launch that a GPU would refuse, EmulatorCrash where the kernel ended the process or ran
        for longer than it may, DebuggerLeft where the user quit gdb.
        """
        kernels = self._load(so)
        if kernel not in kernels:
            raise UserError(f"{so.name} has no kernel {kernel}: it has {', '.join(sorted(kernels)) or 'none'}")
        if schedule not in SCHEDULES:
            raise UserError(f"schedule: expected forward, reverse or random, got {schedule!r}")
        self._flush()
        whole = [*_extent("grid", grid), *_extent("block", block), shared_bytes, sanitize | traffic << 1]
        request = struct.pack("<9I", kernels[kernel][0], *whole)
        seconds = self.seconds_for(so, kernel, math.prod((*grid, *block)))
        limit = 0 if self.gdb is not None else max(1, round(1000 * seconds))
        request += struct.pack("<IQII", SCHEDULES[schedule], seed % (1 << 64), limit, len(arguments))
        for value in arguments:
            request += struct.pack("<I", len(value)) + value
        reply = self._ask(LAUNCH, request, f"kernel {kernel}", OVERSLEPT * (1 + seconds))
        findings = read_findings(reply["findings"], kernel)
        if endless := reply.get("endless"):
            self._stop()
            self._endless.add((so, kernel))
            ending, findings = without_end(findings, endless)
            what = f"kernel {kernel} did not finish in {seconds:.2g} s of computing and was stopped: {ending}; {SPOILT}"
            raise EmulatorCrash(what, findings)
        if reply.get("crash"):
            self._stop()
            raise EmulatorCrash(f"{findings[-1]}; {SPOILT}", findings)
        notes = [finding for finding in findings if finding.is_note]
        return Report([f for f in findings if not f.is_note], notes, read_traffic(reply["traffic"]))

    def seconds_for(self, so: Path, kernel: str, threads: int) -> float:
        """What a launch of so many threads may compute: in proportion to them, and to the bytes that arrays hold."""
        if self.timeout is not None:
            return self.timeout
        size = threads / THREADS_PER_SHARE + sum(self._live.values()) / BYTES_PER_SHARE
        return self._seconds * (1 + size) * (AFTER_AN_ENDLESS_ONE if (so, kernel) in self._endless else 1)

    # --- the process ---

    def _start(self) -> None:
        if self._child is not None:
            return
        ours, theirs = socket.socketpair()
        command = [str(emulator_executable()), "--memory-fd", str(self._memory_fd)]
        command += ["--memory-bytes", str(self._bytes), "--channel-fd", str(theirs.fileno())]
        if self.gdb is not None:
            command = [*_debugger(self.gdb), *command]
        with theirs:
            self._child = subprocess.Popen(
                command,
                pass_fds=(self._memory_fd, theirs.fileno()),
                stdin=None if self.gdb is not None else subprocess.DEVNULL,
            )
        self._channel = ours
        weakref.finalize(self, _end, self._child, ours)

    def _stop(self) -> None:
        if self._child is not None and self._channel is not None:
            _end(self._child, self._channel)
        self._child = self._channel = None
        self._kernels.clear()
        self._regions = bytearray().join(struct.pack("<QQI", *live, STATES["written"]) for live in self._live.items())

    def close(self) -> None:
        """End the process; its memory goes with the last array that looks at it."""
        self._stop()

    def _flush(self) -> None:
        if self._regions:
            payload, self._regions = bytes(self._regions), bytearray()
            self._ask(REGION, payload, "allocating device memory")

    def _ask(self, opcode: int, payload: bytes, what: str, patience: float = 120.0) -> Mapping[str, Any]:
        channel = self._channel
        assert channel is not None
        channel.settimeout(patience if self.gdb is None else None)
        try:
            with _interrupts_left_to_gdb(self.gdb is not None):
                channel.sendall(struct.pack("<II", opcode, len(payload)) + payload)
                status, size = struct.unpack("<II", _receive(channel, 8))
                text = _receive(channel, size)
        except TimeoutError:
            self._stop()
            raise EmulatorCrash(
                f"{what} gave no answer in {patience:g} s, and the emulator was stopped; {SPOILT}"
            ) from None
        except ConnectionError:
            code = self._child.wait() if self._child is not None else None
            self._stop()
            if self.gdb is not None:
                raise DebuggerLeft from None
            raise EmulatorCrash(f"{what}: the emulator ended (exit status {code}); {SPOILT}") from None
        except BaseException:  # an interrupt: the answer that would still come must not be taken for the next one's
            self._stop()
            raise
        if status:
            raise UserError(f"{what}: {text.decode()}")
        reply: Mapping[str, Any] = json.loads(text)
        return reply


def seconds_asked_for() -> float:
    """What a small launch may compute, by the environment. Raises BackendUnavailable for what is no time."""
    given = os.environ.get(SECONDS, "").strip() or f"{USUAL_SECONDS}"
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise BackendUnavailable(f"${SECONDS}: expected seconds, above 0 to 86400, got {given!r}")
    return seconds


def _receive(channel: socket.socket, size: int) -> bytes:
    received = bytearray()
    while len(received) < size:
        piece = channel.recv(size - len(received))
        if not piece:
            raise ConnectionError
        received += piece
    return bytes(received)


@contextmanager
def _interrupts_left_to_gdb(debugged: bool) -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal, and is meant for gdb."""
    if not debugged or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _extent(name: str, values: Sequence[int]) -> list[int]:
    if not 1 <= len(values) <= 3 or any(not 0 <= value < 1 << 32 for value in values):
        raise UserError(f"{name}: expected one to three sizes, got {tuple(values)}")
    return [*values, *[1] * (3 - len(values))]


def _debugger(place: str) -> list[str]:
    path = shutil.which("gdb")
    if path is None:
        raise BackendUnavailable("gdb is not found: apt install gdb (Debian, Ubuntu), dnf install gdb (Fedora)")
    stops = ["set breakpoint pending on", f"break {place}", "run"]
    return [path, "-q", *(word for stop in stops for word in ("-ex", stop)), "--args"]


def _end(child: subprocess.Popen[bytes], channel: socket.socket) -> None:
    channel.close()
    if child.poll() is None:
        child.kill()
    child.wait()
