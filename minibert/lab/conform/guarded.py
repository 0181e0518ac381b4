"""A kernel runs first in a process of its own, on arrays whose ends touch memory that may not be touched.

What it does there cannot harm this process: an access beyond an array, a call that does not end, an exit. It is told
like any other failure, with the array and, for Numba's kernels, the line: a second process compiles the kernel with
bounds checks and gives it the same input. Its results must have the same bits at every call, and whatever the memory
holds that nothing wrote. Whether they are right is for the other demands.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np

from minibert import backends
from minibert.backends import Backend
from minibert.backends.base import Kernel
from minibert.kernels import OPS, Op
from minibert.kernels.drawing import Drawn
from minibert.lab.conform.case import EMULATED_SHAPE, SHAPE, STEP, Broken, Case, Input, Tally, rounded
from minibert.lab.conform.drawn import sizes_of, values_of
from minibert.lab.conform.empty import empty_samples
from minibert.lab.conform.guarded_process import START_SECONDS, Ended, GuardedProcess, Hung, guarded_process, unguarded
from minibert.lab.conform.jobs import REPEATS, Given, Job, given
from minibert.lab.conform.layouts import LAYOUTS
from minibert.lab.conform.reached import index_beyond, what_ended, writers_frame

CALL_SECONDS = 5.0  # a call that takes longer, where those before it took milliseconds, does not end
CALLS_BEFORE = 20  # ... and as many times what the slowest input before took
REPEAT_SECONDS, OWN_REPEAT_SECONDS = 2.0, 0.05  # of 1000 calls on one input; of a kernel of this package
REPEATED_ELEMENTS = 16  # of an input that is called again and again, at least: less may have nothing to go wrong


class Verdict(NamedTuple):
    """What a trial found; of a kernel that did nothing wrong, only how often it was called."""

    problem: str = ""  # as a demand tells it
    harmful: bool = False  # whether the same call here could spoil or end this process
    inputs: int = 0
    calls: int = 0  # on one of them, with the same bits each time


def guarded(case: Case, tally: Tally) -> None:
    """Run in another process, the kernel stays within its arrays, ends, and gives the same bits at 1000 calls."""
    verdict = trial(case)
    if verdict.problem:
        raise Broken(verdict.problem + ("; nothing else was tried, for this process's sake" if verdict.harmful else ""))
    tally.inputs += verdict.inputs
    theirs = hasattr(case.backend.kernel(case.op), "spec")
    if theirs and 0 < verdict.calls < REPEATS:
        tally.left_out = f"more than {verdict.calls} of {REPEATS} calls on one input (slow)"


def refuse_harm(check: str, case: Case) -> None:
    """Before any other check: raise Broken where the kernel would end this process or spoil it, as it did another."""
    if check != "guarded" and (verdict := trial(case)).harmful:
        raise Broken(verdict.problem)


def trial(case: Case) -> Verdict:
    """What the kernel did in a process of its own, once for all demands; nothing where it cannot be tried there.

    What it did to that process in one dtype, it is not asked to do again in another.
    """
    with _one_at_a_time:
        trials = _trials(case.op, case.backend, case.backend.kernel(case.op))
        if case not in trials:
            harm = next((verdict for verdict in trials.values() if verdict.harmful), None)
            trials[case] = harm or (Verdict() if not_tried(case) else _Trial(case).verdict())
        return trials[case]


def remember(case: Case, verdict: Verdict) -> None:
    """Have it for what a trial finds: somebody else has tried this kernel."""
    _trials(case.op, case.backend, case.backend.kernel(case.op))[case] = verdict


@lru_cache(maxsize=64)
def _trials(op: Op, backend: Backend, kernel: Kernel | None) -> dict[Case, Verdict]:
    return {}


_one_at_a_time = Lock()


def begin_guarded(places: Iterable[Backend]) -> None:
    """Start the other process, so that it is ready when a kernel of one of these is tried."""
    with suppress(ImportError, OSError):  # which is told when it is needed
        if any(not place.emulated and place.by(op) == "kernel" for place in places for op in OPS.values()):
            from minibert.kernels.cpu import guard_pages

            if not guard_pages.unavailable():
                guarded_process()


def not_tried(case: Case) -> str:
    """Why the kernel cannot be tried in another process; empty where it can."""
    op, backend = case.op, case.backend
    if backend.by(op) != "kernel":
        return f"no kernel that could reach beyond its arrays: a {backend.by(op)} runs the op"
    if hasattr(backend.asarray(np.zeros(1, np.float32)), "address"):
        return f"{backend.name} has memory of its own, which another process cannot guard"
    if not op.family.startswith("minibert.kernels."):
        return "the op is defined outside of minibert.kernels, where another process does not look"
    if not _kernel_name(op, backend):
        return "the kernel was made in this process, and another cannot find it by a name"
    return unguarded()


def _kernel_name(op: Op, backend: Backend) -> str:
    """By which `load_kernels` finds the kernel in any process; empty where it does not."""
    kernel, place = backend.kernel(op), backends.spec_of(backend)
    if ":" not in place and place not in backends.names():
        return ""
    if spec := getattr(kernel, "spec", ""):  # given by --kernel
        return str(spec).rpartition("=")[0]
    module, name = getattr(kernel, "__module__", ""), getattr(kernel, "__name__", "")
    known = module.startswith("minibert.") or place not in backends.BUILT_IN
    return f"{module}:{name}" if known and getattr(sys.modules.get(module), name, None) is kernel else ""


def _inputs(case: Case, own: bool) -> tuple[dict[int, Given], list[Drawn]]:
    """By number the samples, empty ones, and last the op's part in a step; and what is drawn, for kernels of others:
    ours take a minute."""
    op = case.op
    samples = dict(enumerate(rounded(op, one, case.dtype) for one in op.samples(np.random.default_rng(case.seed))))
    for one in empty_samples(op, case.dtype, case.seed, case.backend.product_mode):
        samples[len(samples)] = one.arrays, one.params
    step = op.bench(np.random.default_rng(case.seed), EMULATED_SHAPE if own else SHAPE)
    samples[STEP] = rounded(op, step, case.dtype)
    return samples, [] if own or op.draw is None else [*values_of(case), *sizes_of(case)]


class _Trial:
    """One case, as it is followed from here."""

    def __init__(self, case: Case) -> None:
        kernel = _kernel_name(case.op, case.backend)
        own = kernel.startswith("minibert.")
        self.case = case
        samples, drawn = _inputs(case, own)
        self.inputs: list[Given | Drawn] = [*samples.values(), *drawn]
        self.numbers = list(samples)
        self.job = Job(
            case.op.name, backends.spec_of(case.backend), kernel, case.dtype, case.backend.num_threads(), self.inputs,
            _repeated([*samples.values()]), OWN_REPEAT_SECONDS if own else REPEAT_SECONDS,
        )  # fmt: skip
        self.call: tuple[str, int] | None = None  # the way in which an input was placed or laid out, and its number
        self.addresses: Sequence[int] = ()  # of its arrays
        self.seconds: dict[int, float] = {}  # the fastest call on each input

    def verdict(self) -> Verdict:
        process = guarded_process()
        try:
            return self._followed(process)
        except Hung:
            slowest = max(self.seconds.values(), default=0.0)
            problem = f"did not end in {self._limit():.0f} s"
            problem += f", where the slowest before it took {slowest:.2g} s" if slowest else ""
            problem += writers_frame(process.said())
        except Ended:
            one = given(self.case.op, self.inputs[self.call[1]], self.case.dtype) if self.call else None
            problem = what_ended(process, self.case.op, one, self.addresses)
            at = index_beyond(self.job._replace(only=self.call)) if self.call and process.notes.fault() else ""
            problem += at or writers_frame(process.said())
        return self._found(problem, harmful=True)

    def _followed(self, process: GuardedProcess) -> Verdict:
        compiling, calls, found = False, 0, Verdict()
        process.send(self.job)
        while True:
            waits = self.call is not None and not compiling
            name, *told = process.event(self._limit() if waits else START_SECONDS)
            if name == "end":
                return found._replace(inputs=len(self.inputs), calls=calls)
            if name == "compiling":
                compiling = told[0]
            elif name == "call":
                self.call, self.addresses = (told[0], told[1]), told[2]
            elif name == "took" and self.call is not None:
                self.seconds[self.call[1]] = min(told[0], self.seconds.get(self.call[1], told[0]))
            elif name == "same":
                calls = told[0]
            elif name in ("problem", "raised") and not found.problem:
                # what is raised, the other checks tell in the same words
                found = self._found(told[0], harmful=False) if name == "problem" else Verdict(told[0])

    def _limit(self) -> float:
        return CALL_SECONDS + CALLS_BEFORE * max(self.seconds.values(), default=0.0)

    def _found(self, problem: str, harmful: bool) -> Verdict:
        """A problem, and the input that the last call was on."""
        if self.call is None:
            return Verdict(problem, harmful)
        way, number = self.call
        drawn, (arrays, params) = self.inputs[number], given(self.case.op, self.inputs[number], self.case.dtype)
        if isinstance(drawn, Drawn):
            one = Input(drawn.number, arrays, params, [], drawn)
        else:
            one = Input(self.numbers[number], arrays, params, [])
        how = f", inputs laid out {way}" if way in LAYOUTS else ""
        return Verdict(f"{one}{how}: {problem}", harmful)


def _repeated(samples: Sequence[Given]) -> int:
    """The number of the smallest sample that has enough elements."""
    sizes = [sum(a.size for a in arrays) for arrays, _ in samples]
    enough = [n for n, size in enumerate(sizes) if size >= REPEATED_ELEMENTS] or range(len(sizes))
    return min(enough, key=sizes.__getitem__)
