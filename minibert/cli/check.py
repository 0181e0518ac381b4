"""`minibert check`: the conformance and gradient checks, for a person."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, product
from typing import Any, NamedTuple

import typer
from rich.markup import escape
from rich.table import Table

from minibert.backends import MOST_THREADS, Backend, get, spec_of
from minibert.cli import app
from minibert.cli.compiling import show_compiling
from minibert.cli.emulator import (
    GDB_HELP,
    SANITIZE_HELP,
    SCHEDULES_HELP,
    TRAFFIC_COLUMNS,
    TRAFFIC_HELP,
    emulator_options,
    traffic_table,
)
from minibert.cli.jobs import JOBS_HELP, in_jobs, usual_jobs
from minibert.cli.legend import ULP_HELP, show
from minibert.cli.options import (
    BACKENDS,
    OWN_HELP,
    PRODUCTS_HELP,
    chosen_backends,
    console,
    notes,
    plain_table,
    set_products,
)
from minibert.errors import UserError
from minibert.kernels import OPS, Op
from minibert.lab.conform.case import Case
from minibert.lab.conform.check import CHECKS, CheckResult, check, find_op, gradient_verdict, planned, refused
from minibert.lab.conform.drawn import any_size
from minibert.lab.conform.guarded import Verdict, begin_guarded, not_tried, remember, trial
from minibert.lab.conform.own_kernels import HELP, given_again, load_kernels, refuse_untriable

ALLOW_HELP = (
    "`--allow poor`: a kernel does not fail that is right by its bound and has more error than sensible orders of "
    "evaluation reach."
)
SHARES = 4  # of the sizes that are drawn for an op: short parts end together
MOST_PERCENT = 1e6  # above it only the power of ten tells a person anything


@app.command("check")
def check_command(
    names: list[str] = typer.Argument(None, metavar="[OP ...]", help="Ops to check; all of them if none is named."),
    backend: str = typer.Option(
        None, *BACKENDS, help=f"Backends to check, as in numpy,numba; default: all. {OWN_HELP}"
    ),
    dtype: str = typer.Option(None, help="As in float32,bfloat16; default: float32, and on numpy float64 too."),
    kernel: list[str] = typer.Option([], help=HELP),
    seed: int = typer.Option(0, min=0, help="Seed of the inputs."),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, help="Threads of every backend."),
    products: str = typer.Option("float32", help=PRODUCTS_HELP),
    schedules: str = typer.Option(None, help=SCHEDULES_HELP),
    sanitize: bool = typer.Option(True, help=SANITIZE_HELP),
    thorough: float = typer.Option(
        0, min=0, metavar="MINUTES", help="After the checks, go on drawing inputs of any size and values so long."
    ),
    allow: str = typer.Option(None, metavar="poor", help=ALLOW_HELP),
    ulp: bool = typer.Option(False, "--ulp", help=ULP_HELP),
    traffic: bool = typer.Option(False, help=TRAFFIC_HELP),
    gdb: str = typer.Option(None, metavar="FILE:LINE", help=GDB_HELP),
    jobs: int = typer.Option(None, min=1, help=JOBS_HELP),
) -> int:
    """Check every op on every backend against its formula in float64, and every gradient against the exact derivative.

    A kernel passes if each element of each output lies under the error bound that its formula implies. Exit status 1 if
    any check fails.
    """
    if allow not in (None, "poor"):
        raise UserError(f"--allow: expected poor, got {allow!r}")
    alone = bool(kernel or traffic or gdb)  # what they do is seen in this process
    if alone and jobs is not None and jobs > 1:
        raise UserError("--jobs: expected 1 with --kernel, --traffic and --gdb")
    kernels = load_kernels(kernel)
    compared = chosen_backends(backend, threads)
    begin_guarded(compared)
    set_products(compared, products)
    ops = [find_op(name) for name in names] if names else list(kernels) or list(OPS.values())
    if kernels and not set(kernels) <= set(ops):
        raise UserError(
            f"--kernel replaces {', '.join(o.name for o in kernels)}, but only {', '.join(names)} is checked"
        )
    results: list[CheckResult] = []
    dtypes = [name.strip() for name in dtype.split(",")] if dtype is not None else None
    for place in compared:  # before the emulator is compiled
        for each in dtypes or ():
            place.require_dtype(each)
    asked = Asked(
        ops=[op.name for op in ops], backends=[*map(spec_of, compared)], dtypes=dtypes, seed=seed,
        allow_poor=allow == "poor", threads=threads, products=products, schedules=schedules, sanitize=sanitize,
    )  # fmt: skip
    with ExitStack() as stack:
        status = notes.status("checking")
        if not gdb:  # which has the terminal
            stack.enter_context(status)
        emulator = stack.enter_context(emulator_options(compared, schedules, sanitize, traffic, gdb))
        stack.enter_context(show_compiling(status.update))
        for place in compared:
            stack.enter_context(place.using(kernels))
        usual = 1 if alone else usual_jobs()
        shared = in_jobs(asked, min(jobs or usual, (1 + SHARES) * len(ops) * len(compared)))
        drawn = check(ops, compared, dtypes, seed, allow == "poor", 60 * thorough, only=())
        for result in chain(shared, drawn):
            if isinstance(result, dict):
                emulator.emulator.notes.update(result)
                continue
            results.append(result)
            refuse_untriable(kernels)
            status.update(f"checking {result.op} on {result.backend} in {result.dtype}: {result.check}")
        if traffic:
            counted = traffic_table(emulator.emulator)
    results = sorted(_together(results), key=lambda result: _place_in_plan(result, ops, compared))
    show(_table(results, ulp))
    if traffic:
        show(counted, TRAFFIC_COLUMNS)
    failed = [r for r in results if not r.ok]
    again = given_again(kernel) + (f" --threads {threads}" if threads else "")
    again += f" --products {products}" if products != "float32" else ""
    again += (f" --schedules {schedules}" if schedules else "") + ("" if sanitize else " --no-sanitize")
    for message in _messages(failed):
        console.print(f"[red]FAIL[/red] {escape(message + again)}", highlight=False, soft_wrap=True)
    for line in _told(results, ops, compared, dtypes, kernels):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    tried, count = sum(r.inputs for r in results), len({(r.op, r.backend) for r in results})
    verdict = f"{len(results) - len(failed)} of {len(results)} checks passed: {count} op-backend pairs, {tried} inputs"
    console.print(f"[{'red' if failed else 'green'}]{'FAIL' if failed else 'PASS'}[/] {verdict}", highlight=False)
    return 1 if failed else 0


class Part(NamedTuple):
    """Of a check: some demands of an op on a backend."""

    op: str
    backend: str
    demands: tuple[str, ...]
    share: tuple[int, int] = (0, 1)  # of what is drawn


@dataclass(frozen=True)
class Asked:
    """How each part is to be checked, in whatever process."""

    ops: Sequence[str]
    backends: Sequence[str]
    dtypes: Sequence[str] | None
    seed: int
    allow_poor: bool
    threads: int | None
    products: str
    schedules: str | None
    sanitize: bool

    def parts(self) -> list[Part]:
        """One for each op and backend; and where sizes are drawn, which takes longest, as many `SHARES` of them."""
        quick: list[Part] = []
        long: list[Part] = []
        beside: list[Part] = []  # others begin later, and at the end
        for op, backend in product(self.ops, self.backends):
            names = dict.fromkeys(name for name, _ in planned(get(backend), OPS[op], self.dtypes))
            of_sizes = tuple(name for name in names if name == any_size.__name__)
            long += [Part(op, backend, of_sizes, (k, SHARES)) for k in range(SHARES if of_sizes else 0)]
            rest = beside if of_sizes else quick
            rest.append(Part(op, backend, tuple(name for name in names if name not in of_sizes)))
        return quick + long + beside

    def begin(self) -> None:
        chosen_backends(",".join(self.backends), self.threads)

    def here(self, part: Part) -> Iterator[Any]:
        yield from check(
            [part.op], [part.backend], self.dtypes, self.seed, self.allow_poor, only=part.demands, share=part.share
        )

    def known(self, part: Part) -> list[tuple[str, Verdict]]:
        """What the kernel of a part did in a process of its own, by dtype."""
        op, place = OPS[part.op], get(part.backend)
        dtypes = dict.fromkeys(dtype for _, dtype in planned(place, op, self.dtypes))
        return [(dtype, trial(Case(op, place, dtype, self.seed))) for dtype in dtypes]

    def there(self, part: Part, known: list[tuple[str, Verdict]]) -> list[Any]:
        """The results in a process that knows nothing of the command; and what the emulator noted, if it was that."""
        places = chosen_backends(part.backend, self.threads)
        for dtype, verdict in known:
            remember(Case(OPS[part.op], places[0], dtype, self.seed), verdict)
        set_products(places, self.products)
        emulates = places[0].emulated
        with emulator_options(places, self.schedules if emulates else None, self.sanitize or not emulates) as emulator:
            results = list(self.here(part))
            if emulator is None:
                return results
            noted = dict(emulator.emulator.notes)
            emulator.emulator.notes.clear()  # they are told once, by who asked
            return [*results, noted]


def _together(results: Iterable[CheckResult]) -> Iterable[CheckResult]:
    """One of each check, whose inputs may have been shared."""
    found: dict[tuple[str, ...], CheckResult] = {}
    for result in results:
        what = (result.op, result.backend, result.dtype, result.check)
        found[what] = found[what].with_share(result) if what in found else result
    return found.values()


def _place_in_plan(result: CheckResult, ops: Sequence[Op], places: Sequence[Backend]) -> tuple[int, ...]:
    """Where the table and the messages have it; what was drawn for `--thorough` comes last."""
    op, place = ([each.name for each in group] for group in (ops, places))
    demands = list(CHECKS)
    number = demands.index(result.check) if result.check in demands else len(demands)
    return number == len(demands), op.index(result.op), place.index(result.backend), number


def _told(
    results: list[CheckResult], ops: list[Op], places: list[Backend], dtypes: list[str] | None, kernels: Any
) -> Iterator[str]:
    """What is not wrong, and should be known: what was allowed to be poor, and what was not run."""
    for result in results:
        if result.ok and result.poor:
            yield f"poor, and allowed: {result.op} on {result.backend} in {result.dtype}: {result.poor}"
        if result.left_out:
            yield f"not run: {result.check} of {result.op} on {result.backend} with {result.left_out}"
    for place in places if kernels else ():
        with place.using(kernels):
            for op in ops:
                if not place.emulated and (why := not_tried(Case(op, place, "float32", 0))):
                    yield f"not run: guarded of {op.name} on {place.name}: {why}"
                for dtype, why in refused(place, op, dtypes).items():
                    yield f"not run: {op.name} on {place.name} in {dtype}: {why}; ask for it by --dtype {dtype}"


# where a kernel raised, and how often: the reason is the same
PLACE = re.compile(r" \(arrays of shapes .*?\)(?=; again by)|, seen \d+ times?|(?<=\): )[^\n]*?: (?=raised |--kernel )")


def _messages(failed: list[CheckResult]) -> list[str]:
    """What went wrong, once: checks that fail for one reason are named together."""
    alike: dict[str, list[CheckResult]] = defaultdict(list)
    for result in failed:
        alike[PLACE.sub("", result.message.replace(f" {result.check} (seed ", " (seed ", 1))].append(result)
    told = []
    for group in alike.values():
        checks = ", ".join(result.check for result in group)
        message = group[0].message.replace(f" {group[0].check} (seed ", f" {checks} (seed ", 1)
        # findings come a line each, and so does what shows them again
        told.append(message.replace("; again by: ", "\n  again by: ") if "\n" in message else message)
    return told


def _table(results: list[CheckResult], ulp: bool) -> Table:
    """A row for each op, backend and dtype: what was tried, and the worst of it."""
    rows: dict[tuple[str, str, str], list[CheckResult]] = defaultdict(list)
    for result in results:
        rows[result.op, result.backend, result.dtype].append(result)
    measures = ("max ulp", "err/uS", "of bound") if ulp else ("err/uS", "of bound")
    shown = []
    for (op, backend, dtype), group in rows.items():
        forward = [r for r in group if r.check in ("follows_formula", "part_in_step")]
        shown.append([
            op, backend, dtype, group[0].by, str(len(group)), str(sum(r.inputs for r in group)),
            *([_worst(forward, "ulp_max")] if ulp else []), _worst(forward, "err_over_us"),
            _worst(forward, "bound_share", _percent),
            gradient_verdict(group).replace("wrong", "[red]wrong[/red]"),
            _verdict(group),
        ])  # fmt: skip
    header = ["op", "backend", "dtype", "by", "checks", "inputs", *measures, "gradient", ""]
    table = plain_table(*header)
    for row in shown:
        table.add_row(*row)
    return table


def _verdict(results: list[CheckResult]) -> str:
    failed = [r for r in results if not r.ok]
    if not failed:
        return "[yellow]poor[/yellow]" if any(r.poor for r in results) else "[green]ok[/green]"
    return "[red]FAIL[/red]" if any(" fails " in r.message for r in failed) else "[yellow]poor[/yellow]"


def _worst(results: list[CheckResult], measure: str, written: Callable[[float], str] = "{:.3g}".format) -> str:
    """The largest; empty where nothing was measured, or a result has no distance from the formula, as NaN."""
    worst = max((v for v in (getattr(r, measure) for r in results) if v is not None), default=math.inf)
    return written(worst) if math.isfinite(worst) else ""


def _percent(share: float) -> str:
    return f"{share:.1%}" if share <= MOST_PERCENT / 100 else f"{100 * share:.0e}%"
