"""What the conformance suite puts to a backend or kernel from outside: read from its options, planned, and told.

`minibert.conformance` runs it under pytest; nothing here knows pytest.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minibert
from minibert import backends
from minibert.backends import Backend
from minibert.backends.own import module_name
from minibert.errors import UserError
from minibert.kernels import OPS, Op
from minibert.lab.conform.case import Case, Input
from minibert.lab.conform.check import CHECKS, find_op, planned
from minibert.lab.conform.empty import empty_samples
from minibert.lab.conform.guarded import not_tried
from minibert.lab.conform.own_kernels import TriedKernel, load_kernels

PREFIX = "conformance::"  # of every id
DTYPES = ("float32", "float64", "float16", "bfloat16")
DEFAULT_BACKEND = "numba"
LISTED = 6  # names in a line of the footer before the others are counted


class Demand(NamedTuple):
    """One item of the suite."""

    op: Op
    check: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.op.name}-{self.check}-{self.dtype}"


@dataclass
class Suite:
    """What is under test, and what is asked of it."""

    spec: str  # as --backend names it
    place: Backend
    kernels: dict[Op, TriedKernel]
    kernel_specs: list[str]
    asked: list[str] | None  # dtypes
    seed: int
    demands: list[Demand] = field(default_factory=list)
    not_run: dict[str, set[tuple[str, str]]] = field(default_factory=dict)  # reason -> (op, check)
    expected_failures: dict[str, str] = field(default_factory=dict)  # id -> where it is listed
    selected: list[str] | None = None  # ids given on the command line
    # the last call that went through the backend's door: op, shapes, parameters
    last_call: tuple[Op, tuple[tuple[int, ...], ...], Mapping[str, Any]] | None = None

    @contextmanager
    def under_test(self) -> Iterator[Backend]:
        """A block in which the backend runs the kernels on trial."""
        with self.place.using(self.kernels):
            yield self.place

    def command(self, demand: Demand) -> str:
        """The line that runs one demand again."""
        words = ["pytest", "-p", "minibert.conformance", "--backend", self.spec]
        words += [word for spec in self.kernel_specs for word in ("--kernel", spec)]
        words += ["--dtypes", ",".join(self.asked)] if self.asked else []
        words += ["--conformance-seed", str(self.seed)] if self.seed else []
        return shlex.join([*words, f"{PREFIX}{demand}"])


def read_suite(option: Any) -> Suite:
    """What the options (`conformance_*`) ask for.

    Raises UserError for a wrong one and BackendUnavailable for what cannot run here.
    """
    spec = option.conformance_backend or DEFAULT_BACKEND
    place = backends.get(spec)
    threads = os.environ.get(backends.THREADS, "").strip()
    if threads:
        if not threads.isdecimal() or not 1 <= int(threads) <= backends.MOST_THREADS:
            raise UserError(f"${backends.THREADS}: expected 1 to {backends.MOST_THREADS} threads, got {threads!r}")
        place.set_num_threads(int(threads))
    kernels = load_kernels(option.conformance_kernels)
    seed = str(option.conformance_seed)
    if not seed.isdecimal():
        raise UserError(f"--conformance-seed: expected a whole number from 0, got {seed!r}")
    asked = _words("--dtypes", option.conformance_dtypes)
    for dtype in asked or ():
        place.require_dtype(dtype, "--dtypes")
    named = _words("--ops", option.conformance_ops)
    ops = [find_op(name) for name in named] if named else list(kernels) or list(OPS.values())
    for op in kernels:
        if op not in ops:
            raise UserError(f"--kernel replaces {op.name}, but only {option.conformance_ops} is checked")
    suite = Suite(spec, place, kernels, list(option.conformance_kernels), asked, int(seed))
    with suite.under_test():
        for op, kernel in kernels.items():
            if place.kernel(op) is not kernel:  # or the checks would speak of another kernel
                raise UserError(
                    f"--kernel: {spec} does not run kernels given by using(): {kernel.spec} cannot be tried"
                )
        suite.demands = [demand for op in ops for demand in _planned(suite, op)]
        suite.not_run = _not_run(suite, ops)
    suite.expected_failures = _expected_failures(option.conformance_expected)
    selected = getattr(option, "conformance_selected", None)
    if selected:
        suite.selected = [word.removeprefix(PREFIX) for word in selected]
        known = set(map(str, suite.demands))
        for word in suite.selected:
            _read_id(word, f"{PREFIX}{word}")
            if word not in known:
                raise UserError(f"{PREFIX}{word} is not run on {place.name}; --collect-only lists what is")
    return suite


def _words(name: str, text: str | None) -> list[str] | None:
    """The words of `a,b`, each once; None where the option is not given."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or len(set(words)) != len(words):
        raise UserError(f"{name}: expected names with commas between them, each once, got {text!r}")
    return words


def _read_id(text: str, where: str) -> None:
    """Raise UserError unless `text` is OP-CHECK-DTYPE."""
    parts = text.split("-")
    if len(parts) != 3 or parts[1] not in CHECKS or parts[2] not in DTYPES:
        raise UserError(f"{where}: expected an id such as softmax-follows_formula-float32, got {text!r}")
    try:
        find_op(parts[0])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _expected_failures(name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--expected-failures: {name} cannot be read: {error}") from error
    listed = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip().removeprefix(PREFIX)
        if text:
            _read_id(text, f"{name}:{number}")
            listed[text] = f"{name}:{number}"
    return listed


def inputs(suite: Suite, demand: Demand) -> tuple[Input, ...]:
    """What the op of a demand is run on."""
    case = Case(demand.op, suite.place, demand.dtype, suite.seed)
    if demand.check == "empty_inputs":
        return empty_samples(demand.op, demand.dtype, suite.seed, suite.place.product_mode)
    if demand.check == "part_in_step":
        return (case.part_in_step(),)
    return case.inputs()


def _planned(suite: Suite, op: Op) -> Iterator[Demand]:
    """What is put to one op."""
    yield from (Demand(op, *pair) for pair in planned(suite.place, op, suite.asked))


def _not_run(suite: Suite, ops: Sequence[Op]) -> dict[str, set[tuple[str, str]]]:
    """Every check that is not put to an op in some dtype, by the reason."""
    run = set(suite.demands)
    dtypes = dict.fromkeys(d.dtype for d in suite.demands)  # of the others the footer speaks in one line
    reasons: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for op in ops:
        for check in CHECKS:
            for dtype in dtypes:
                # a gradient is compared with the exact derivative in float64, and with its bound in the others
                elsewhere = (check == "gradient") != (dtype == "float64") and check.startswith("gradient")
                if Demand(op, check, dtype) not in run and not elsewhere:
                    reasons[_reason(suite, op, check, dtype)].add((op.name, check))
    return reasons


def _reason(suite: Suite, op: Op, check: str, dtype: str) -> str:
    place = suite.place
    if check.startswith("gradient") and op.vjp is None:
        return "the op has no gradient"
    if check == "order_of_work" and place.by(op) != "kernel":
        return f"no kernel whose work could be divided: a {place.by(op)} runs the op"
    if check == "guarded" and (why_not := not_tried(Case(op, place, dtype, suite.seed))):
        return why_not
    if check == "empty_inputs" and not empty_samples(op, dtype, suite.seed, place.product_mode):
        return "the formula takes no empty arrays"
    return f"{dtype} was not asked for (--dtypes {dtype})"


# ------------------------------------------------------------------------------------------------ what is told about it


def header(suite: Suite) -> list[str]:
    """What is under test, versions and threads, what is asked."""
    place, count = suite.place, len({d.op for d in suite.demands})
    module = sys.modules.get(module_name(suite.spec.rpartition(":")[0]))
    version = f" {getattr(module, '__version__', '')}".rstrip()
    what = f"{'a kernel on ' if suite.kernels else ''}{suite.spec}{version}"
    dtypes = ", ".join(dict.fromkeys(d.dtype for d in suite.demands))
    lines = [
        f"conformance of {what}: {place.describe()}; threads {place.num_threads()}",
        f"minibert {minibert.__version__}, Python {platform.python_version()}, NumPy {np.__version__}",
        *(f"kernel under test: {spec}" for spec in suite.kernel_specs),
        f"{len(suite.demands)} checks of {count} op{'s'[: count != 1]} in {dtypes}; seed {suite.seed}",
    ]
    if suite.expected_failures:
        files = sorted({where.rpartition(":")[0] for where in suite.expected_failures.values()})
        lines.append(f"expected failures: {len(suite.expected_failures)} in {', '.join(files)}")
    return lines


def footer(suite: Suite, outcomes: Mapping[str, str], table: bool = True) -> list[str]:
    """Checks run, by op and kind; what was not run and why; stale expectations.

    `outcomes` gives passed, failed or xfailed (expected to fail, and did) by id. `table` False: the totals alone.
    """
    stale = {name for name, outcome in outcomes.items() if outcome == "failed" and name in suite.expected_failures}
    outcomes = {name: "passed" if name in stale else outcome for name, outcome in outcomes.items()}
    count = Counter(outcomes.values())
    total = f"{count['passed']} of {len(outcomes)} checks passed, {count['failed']} failed"
    if not outcomes:
        return [f"none of {len(suite.demands)} checks was chosen, or none was reached"]
    lines = _table(suite, outcomes) if table else []
    total += f", {count['xfailed']} failed as expected" if count["xfailed"] else ""
    lines.append(total + (f", {len(stale)} passed that should fail: the list is stale" if stale else ""))
    every = {d.op.name for d in suite.demands}
    left = len(suite.demands) - len(outcomes)
    if left:
        lines.append(f"not run: {left} checks that were not chosen, or not reached")
    for reason, checks in sorted(suite.not_run.items()):
        kinds = dict.fromkeys(check for check in CHECKS if any(check == c for _, c in checks))
        lines.append(f"not run: {', '.join(kinds)} of {_some({op for op, _ in checks}, every)}: {reason}")
    absent = [dtype for dtype in DTYPES if all(d.dtype != dtype for d in suite.demands)]
    unasked = [dtype for dtype in absent if dtype in suite.place.dtypes]
    missing = [dtype for dtype in absent if dtype not in unasked]
    if unasked:
        lines.append(f"not run: anything in {', '.join(unasked)}: not asked for (--dtypes {','.join(unasked)})")
    if missing:
        lines.append(f"not run: anything in {', '.join(missing)}: {suite.place.name} has no such arrays")
    demanded = set(map(str, suite.demands))
    for name, where in suite.expected_failures.items():
        if name in stale:
            lines.append(f"stale: {name} passed, though {where} expects it to fail: remove that line")
        elif name not in demanded:
            lines.append(f"not run: {name}, which {where} expects to fail, is no check of this run")
    return lines


def _table(suite: Suite, outcomes: Mapping[str, str]) -> list[str]:
    """A row for each op and a column for each check: how many dtypes it ran in; "1/2": one of two passed."""
    rows: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for demand in suite.demands:
        if str(demand) in outcomes:
            rows[demand.op.name][demand.check].append(outcomes[str(demand)])
    words = [check.split("_") for check in CHECKS]
    widths = [max(map(len, parts)) for parts in words]
    first = max(map(len, ["all ops", *rows]))
    height = max(map(len, words))

    def line(name: str, cells: Iterable[str]) -> str:
        return f"{name:<{first}}  " + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))

    lines = [line("", ("".join(parts[k : k + 1]) for parts in words)).rstrip() for k in range(height)]
    lines += [line(name, (_cell(row[check]) for check in CHECKS)) for name, row in rows.items()]
    whole = {check: [one for row in rows.values() for one in row[check]] for check in CHECKS}
    return [*lines, line("all ops", (_cell(whole[check]) for check in CHECKS))]


def _cell(outcomes: list[str]) -> str:
    passed = outcomes.count("passed")
    return "-" if not outcomes else str(passed) if passed == len(outcomes) else f"{passed}/{len(outcomes)}"


def _some(names: set[str], every: set[str]) -> str:
    """A few names, and how many more there are."""
    if names == every and len(names) > 1:
        return "all ops"
    shown = sorted(names)[:LISTED]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more ops" if more else "")
