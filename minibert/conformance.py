"""The conformance suite as a pytest plugin: every check of every op, on a backend or a kernel from outside.

    pytest -p minibert.conformance --backend mypkg:MyBackend
    pytest -p minibert.conformance --kernel file.py:fn=softmax

It needs no test files. Each item is one demand of `minibert.lab.conform.check` to one op in one dtype; its id, as
`conformance::softmax-follows_formula-float32`, can be given back to pytest. docs/conformance.md describes it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pytest

import minibert
from minibert import backends
from minibert.backends import Backend, BackendUnavailable
from minibert.errors import UserError
from minibert.kernels import Op
from minibert.lab.conform import gradcheck as own_inputs
from minibert.lab.conform.case import STEP, Broken, Case, Tally
from minibert.lab.conform.guarded import refuse_harm
from minibert.lab.conform.raised import raised_at, writers_line
from minibert.lab.conform.suite import (
    CHECKS,
    DEFAULT_BACKEND,
    PREFIX,
    Demand,
    Suite,
    footer,
    header,
    inputs,
    read_suite,
)

# "sample 3 (shapes (5, 7); params {'axis': -1}), inputs laid out reversed: " and what was found there
WHERE = re.compile(
    r"(?:sample )?(?P<sample>[^(]*?) \(shapes (?P<shapes>.*?); params (?P<params>.*?\})\)(?P<how>.*?): "
    r"(?P<found>.*)",
    re.S,
)
WORST = re.compile(r"(?P<place>[^:]*): expected (?P<expected>.*), got (?P<got>.*?), (?P<off>off by .*)")

SUITE = pytest.StashKey[Suite]()


# ------------------------------------------------------------------------------------------------- options, and a plan


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("minibert.conformance", "minibert: conformance of a backend or kernel")
    group.addoption(
        "--backend", dest="conformance_backend", metavar="BACKEND",
        help="module:attribute or FILE.py:attribute (an instance of Backend, or what gives one when called), or a name "
        "such as numba or emulator; with --kernel, where the kernel runs (default numba).",
    )  # fmt: skip
    group.addoption(
        "--kernel", dest="conformance_kernels", action="append", default=[], metavar="FILE.py:FUNCTION=OP",
        help="Put a function in the place of an op's kernel, and check that op. May be repeated.",
    )  # fmt: skip
    group.addoption("--ops", dest="conformance_ops", metavar="A,B", help="Ops to check; default: all, or the kernels'.")
    group.addoption(
        "--dtypes", dest="conformance_dtypes", metavar="A,B", help="As in float32,bfloat16; default: float32."
    )
    group.addoption(
        "--allow-poor", dest="conformance_allow_poor", action="store_true",
        help="Let pass what is under its bound with more error than sensible orders of evaluation reach.",
    )  # fmt: skip
    group.addoption("--conformance-seed", metavar="N", default="0", help="Seed of the inputs; default: 0.")
    group.addoption(
        "--expected-failures", dest="conformance_expected", metavar="FILE",
        help="Checks that are known to fail, an id a line; one that passes is stale, and fails the run.",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "conformance: a check of minibert's conformance suite")
    option = config.option
    selected = [word for word in config.args if word.startswith(PREFIX)]
    if selected:  # no files: pytest must not look for them
        config.args = [word for word in config.args if word not in selected]
        option.conformance_selected, option.conformance_alone = selected, not config.args
    elif getattr(option, "conformance_alone", False):  # a worker of pytest-xdist, which was told of no files
        config.args = []
    if not option.conformance_backend and not option.conformance_kernels:
        given = {"--ops": option.conformance_ops, "--dtypes": option.conformance_dtypes, PREFIX: selected}
        given["--expected-failures"] = option.conformance_expected
        for name, value in given.items():
            if value:
                raise pytest.UsageError(f"{name} says nothing without --backend or --kernel: give one")
        return
    try:
        config.stash[SUITE] = read_suite(option)
    except (UserError, BackendUnavailable) as error:
        raise pytest.UsageError(" ".join(str(error).split())) from None  # one line, whatever others' code says


# ----------------------------------------------------------------------------------------------------------- the items


class Checks(pytest.Collector):
    """All items of the suite; it has no file."""

    def collect(self) -> list[pytest.Item]:
        suite = self.config.stash[SUITE]
        wanted = suite.demands if suite.selected is None else [d for d in suite.demands if str(d) in suite.selected]
        return [CheckItem.from_parent(self, name=str(demand), demand=demand, suite=suite) for demand in wanted]


class CheckItem(pytest.Item):
    """One demand to one op in one dtype."""

    def __init__(self, *, demand: Demand, suite: Suite, **given: Any) -> None:
        super().__init__(**given)
        self.demand, self.suite = demand, suite
        self.add_marker("conformance")
        listed = suite.expected_failures.get(str(demand))
        if listed:
            reason = f"{listed} expects it to fail; once it passes, remove that line"
            self.add_marker(pytest.mark.xfail(reason=reason, strict=True))

    @property
    def case(self) -> Case:
        return Case(self.demand.op, self.suite.place, self.demand.dtype, self.suite.seed)

    def runtest(self) -> None:
        suite = self.suite
        suite.last_call = None

        def remember(op: Op, arrays: tuple[Any, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
            suite.last_call = op, tuple(tuple(a.shape) for a in arrays), params
            return call()

        with suite.under_test() as place, place.watched_by(remember), np.errstate(all="ignore"):
            refuse_harm(self.demand.check, self.case)
            tally = Tally()
            CHECKS[self.demand.check](self.case, tally)
        if tally.poor and not self.config.option.conformance_allow_poor:
            raise Broken(f"{tally.poor}; poor, not wrong: --allow-poor lets it pass")

    def reportinfo(self) -> tuple[str, None, str]:
        return PREFIX.rstrip(":"), None, self.name

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """What a person needs to see the failure again."""
        error, (op, check, dtype) = excinfo.value, self.demand
        if not isinstance(error, Exception):
            return super().repr_failure(excinfo)
        with self.suite.under_test() as place:
            by = place.by(op)
        demand = (CHECKS[check].__doc__ or check).splitlines()[0]
        lines = {
            "op": f"{op.name}, run by {'a ' * (by != 'formula')}{by} on {place.name}",
            "check": f"{check}: {demand}",
        }
        lines |= {"dtype": dtype, "seed": str(self.suite.seed)}
        lines |= _found(str(error)) if isinstance(error, Broken) else self._raised(error)
        lines["again"] = self.suite.command(self.demand)
        return "\n".join(f"{name:<9} {text}" for name, text in lines.items())

    def _raised(self, error: Exception) -> dict[str, str]:
        """An exception out of a kernel: the sample it was given, and where in its writer's code it came from."""
        lines = {}
        if self.suite.last_call is not None:
            op, shapes, params = self.suite.last_call
            if op is self.demand.op:
                given = inputs(self.suite, self.demand)
                alike = (one.number for one in given if tuple(a.shape for a in one.arrays) == shapes)
                lines = {"sample": ", ".join("part in a step" if n == STEP else str(n) for n in islice(alike, 1))}
            else:
                lines = {"inside": f"{op.name}, which the gradient calls"}
            lines |= {"shapes": ", ".join(map(str, shapes)), "params": str(dict(params))}
        at, said = writers_line(error), raised_at(error)
        if at is not None:
            lines["at"] = f"{said.removeprefix(', at ')}: {at.line}"
        raised = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        lines["raised"] = raised.replace(said, "")  # it has a line of its own
        return lines


def _found(text: str) -> dict[str, str]:
    """The message of a `Broken`, line by line."""
    where = WHERE.fullmatch(text)
    if where is None:
        return {"found": text}
    lines = {"sample": where["sample"] + where["how"], "shapes": where["shapes"], "params": where["params"]}
    worst = WORST.fullmatch(where["found"])
    if worst is None:
        return lines | {"found": where["found"]}
    return lines | {"worst": worst["place"], "expected": worst["expected"], "got": f"{worst['got']}, {worst['off']}"}


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the items
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if SUITE not in config.stash:
        return
    name = PREFIX.rstrip(":")
    checks = Checks.from_parent(session, name=name, nodeid=name)
    report = checks.ihook.pytest_make_collect_report(collector=checks)
    checks.ihook.pytest_collectreport(report=report)  # so that "collected N items" counts them
    items.extend(report.result)


# ------------------------------------------------------------------------------------------ header and footer


def pytest_report_header(config: pytest.Config) -> list[str]:
    if SUITE in config.stash:
        return header(config.stash[SUITE])
    return [f"minibert {minibert.__version__}: no --backend or --kernel, so no conformance suite, only its fixtures"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if SUITE not in config.stash or config.option.collectonly:
        return
    outcomes = {
        report.nodeid.removeprefix(PREFIX): category
        for category in ("passed", "failed", "xfailed")
        for report in terminalreporter.stats.get(category, ())
        if getattr(report, "when", "") == "call" and report.nodeid.startswith(PREFIX)
    }
    terminalreporter.section("conformance")
    for line in footer(config.stash[SUITE], outcomes, table=config.get_verbosity() >= 0):
        terminalreporter.line(line)


# ---------------------------------------------------------------------- fixtures for other people's tests


@pytest.fixture
def backend(pytestconfig: pytest.Config) -> Iterator[Backend]:
    """The backend under test, with the kernels under test; numba where neither is given."""
    if SUITE not in pytestconfig.stash:
        yield backends.get(DEFAULT_BACKEND)
        return
    with pytestconfig.stash[SUITE].under_test() as place:
        yield place


@pytest.fixture
def gradcheck(backend: Backend) -> Callable[..., None]:
    """`gradcheck(op_or_function, *arrays, **params)`: is the gradient exact? See `minibert.lab.conform.gradcheck`."""
    return partial(own_inputs.gradcheck, backend=backend)


@pytest.fixture
def assert_within_bound() -> Callable[..., None]:
    """`assert_within_bound(op, arrays, params, got, dtype="float32")`: is every element under the formula's bound?"""
    return own_inputs.assert_within_bound
