"""`minibert kernels build`: every CUDA kernel compiled for real GPUs, on any machine, and held to a budget."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from minibert.backends import BackendUnavailable
from minibert.backends.cuda import nvrtc
from minibert.backends.cuda.nvrtc import Compiled
from minibert.cli import app
from minibert.cli.budget import (
    ANY_STORAGE,
    BUDGET,
    MEANINGS,
    Row,
    budgeted,
    differences,
    excesses,
    facts,
    markdown,
    read_budget,
    spills,
    table,
    updated,
    write,
    write_budget,
)
from minibert.cli.legend import show
from minibert.cli.options import console, notes, refuse_unwritable
from minibert.errors import UserError
from minibert.kernels.gpu.launch import STORAGE, CudaFile, CudaKernel, families

DTYPE = {c_type: dtype for dtype, c_type in STORAGE.items()}

commands = typer.Typer(help="Compile the CUDA kernels; no GPU is needed.", no_args_is_help=True)
app.add_typer(commands, name="kernels")


@commands.callback()
def kernels_commands() -> None:
    """Compile the CUDA kernels; no GPU is needed."""


class Unit(NamedTuple):
    """One compilation: a file, its -D's, and the rows that are read off it, by the kernel's name in the file."""

    family: str
    file: CudaFile
    defines: dict[str, Any]
    rows: dict[str, Row]

    @property
    def label(self) -> str:
        return variant_name(self.defines)


@commands.command("build")
def build_command(
    names: list[str] = typer.Argument(None, metavar="[FAMILY ...]", help="Families, as in softmax; default: all."),
    arch: str = typer.Option("sm_80,sm_90", help="Architectures; sm_... gives machine code, compute_... PTX."),
    output: Path = typer.Option(None, help="Folder for the compiled code."),
    markdown_file: Path = typer.Option(None, "--markdown", help="Write the table to this file as Markdown."),
    json_file: Path = typer.Option(None, "--json", help="Write the figures to this file as JSON."),
    budget_file: Path = typer.Option(BUDGET, "--budget", show_default="bench/kernel_budget.json", help="The budget."),
    update_budget: bool = typer.Option(False, "--update-budget", help="Make what the kernels take now the budget."),
    threads: int = typer.Option(None, min=1, max=1024, help="Compilations at once; default: the cores."),
) -> int:
    """Compile every CUDA kernel in every variant, and hold registers, stack and shared memory to the committed budget.

    Exit status 1 if a file does not compile, a kernel spills registers, or one takes more than its budget.
    """
    refuse_unwritable(markdown=markdown_file, json=json_file)
    refuse_unwritable(json=budget_file if update_budget else None)
    if missing := nvrtc.available():
        raise BackendUnavailable(missing)
    if names and markdown_file:
        raise UserError("--markdown writes the table of all kernels: name no family")
    tools = nvrtc.toolkit()
    wanted = list(dict.fromkeys(a.strip() for a in arch.split(",") if a.strip()))
    for each in wanted or [arch]:
        nvrtc.check_architecture(tools, each)
    budget, written_with = read_budget(budget_file)
    version = "{}.{}".format(*tools.version)
    if update_budget and names and budget and written_with != version:
        raise UserError(
            f"the budget was written with NVRTC {written_with}, this is {version}: update it for all families"
        )
    if output is not None:
        _make_folder(output)
    units, failures = plan(names or [])
    complete = not names and not failures
    rows = rows_of(units)
    failures += compile_units(units, wanted, output, threads or _cores())

    assembled = [a for a in wanted if a.startswith("sm_")]
    if update_budget:
        budget, written_with = updated(budget if written_with == version else {}, rows, complete), version
        write_budget(budget_file, budget, version)
    failures += spills(rows) + differences(rows, budget, complete)
    above = excesses(rows, budget)
    if written_with == version:
        failures += above
    elif budget:
        say(
            f"the budget was written with NVRTC {written_with}, and only that is held to it; with {version} "
            f"{len(above)} figures exceed it"
        )
    if unknown := [a for a in assembled if a not in budgeted(budget)]:
        say(f"{budget_file} has no budget for {', '.join(unknown)}: only spills are judged there")

    if assembled:
        show(table(rows, assembled), MEANINGS)
    if markdown_file is not None:
        write(markdown_file, markdown(rows, assembled, version))
    if json_file is not None:
        write(json_file, json.dumps(facts(rows, failures, version), indent=1) + "\n")
    for failure in failures:
        console.print(f"[red]FAIL[/red] {escape(failure)}", highlight=False, soft_wrap=True)
    passed = "none spills" + (", none is over its budget" if written_with == version else "")
    console.print(
        f"[{'red' if failures else 'green'}]{'FAIL' if failures else 'PASS'}[/] {len(units)} compilations for each of "
        f"{', '.join(wanted)} with {escape(tools.describe())}: {len(rows)} kernels in their variants, "
        f"{f'{len(failures)} failures' if failures else passed}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return 1 if failures else 0


# ------------------------------------------------------------------------------------------------- what is to compile


def launching_modules() -> dict[str, str]:
    """The modules with launch tables, by family; "cuda" is the driver's own."""
    found = {path.parent.name: f"minibert.kernels.{path.parent.name}.gpu" for path in families()}
    return {**found, "cuda": "minibert.backends.cuda.matmul"}


def plan(names: Sequence[str] = ()) -> tuple[list[Unit], list[str]]:
    """All that the launch tables ask for, and what is wrong with them. Raises UserError for a family without one."""
    modules = launching_modules()
    if unknown := [name for name in names if name not in modules]:
        raise UserError(f"no family with CUDA kernels is called {unknown[0]!r}: choose from {', '.join(modules)}")
    units: list[Unit] = []
    failures = []
    seen = set()
    for family in dict.fromkeys(names or modules):
        try:
            files = _files(modules[family])
        except Exception as error:  # whatever its writer did: the other families are still compiled
            failures.append(f"{modules[family]} cannot be imported: {type(error).__name__}: {error}")
            continue
        for file in files:
            seen.add(file.path.resolve())
            units += units_of(family, file)
            failures += [
                f"kernel {name} of {_shown(file.path)} is never launched: give it a line in {modules[family]}"
                for name in file.signatures if name not in file.kernels
            ]  # fmt: skip
    if not names:
        root = nvrtc.KERNELS.parent
        sources = sorted(path for folder in ("kernels", "backends") for path in (root / folder).rglob("*.cu"))
        failures += [f"{_shown(path)} is in no launch table" for path in sources if path.resolve() not in seen]
    return units, failures


def _files(module: str) -> list[CudaFile]:
    """The CUDA files whose kernels a module launches: its variables are files, or kernels of one."""
    loaded = import_module(module)
    values = list(vars(loaded).values())
    files = [value for value in values if isinstance(value, CudaFile)]
    files += [value.file for value in values if isinstance(value, CudaKernel)]
    return [file for file in dict.fromkeys(files) if file.beside == loaded.__file__]


def _shown(path: Path) -> str:
    return path.resolve().relative_to(nvrtc.KERNELS.parent).as_posix()


def units_of(family: str, file: CudaFile) -> list[Unit]:
    """The compilations that one launch table asks for; kernels with the same -D's share one."""
    units: dict[str, Unit] = {}
    for name, kernel in file.kernels.items():
        for defines in variants_of(kernel):
            flags = {"STORAGE": "float", **defines}  # what gpu_common.cuh takes where nothing is said
            unit = units.setdefault(variant_name(flags), Unit(family, file, flags, {}))
            unit.rows[name] = Row(f"{family}/{name}", variant_name(defines), kernel.block)
    return list(units.values())


def rows_of(units: Sequence[Unit]) -> list[Row]:
    """The rows of all units, those of one kernel together."""
    kernels: dict[str, list[Row]] = {}
    for unit in units:
        for row in unit.rows.values():
            kernels.setdefault(row.kernel, []).append(row)
    return [row for rows in kernels.values() for row in rows]


def variants_of(kernel: CudaKernel) -> list[dict[str, Any]]:
    """The -D's that launches of this kernel ask for."""
    if any(parameter.type == "Storage" for parameter in kernel.signature.parameters):
        kinds = [STORAGE[dtype] for dtype in kernel.storage]
        return [{**variant, "STORAGE": storage} for variant in kernel.variants for storage in kinds]
    return [dict(variant) for variant in kernel.variants]


def variant_name(defines: dict[str, Any]) -> str:
    """{"HEAD_SIZE": 64, "STORAGE": "__half"} is "float16 HEAD_SIZE=64"."""
    storage = DTYPE.get(defines.get("STORAGE", ""), ANY_STORAGE)
    return " ".join([storage, *(f"{name}={defines[name]}" for name in sorted(defines) if name != "STORAGE")])


# ---------------------------------------------------------------------------------------------------------- compiling


def compile_units(units: Sequence[Unit], archs: Sequence[str], output: Path | None, threads: int) -> list[str]:
    """Compile on several threads, into the rows of each unit and into a folder; what failed."""
    failures: dict[str, None] = {}  # in order, each once: a header's error comes with every file
    warnings: set[str] = set()
    for unit, arch, result in _compiled([(unit, arch) for unit in units for arch in archs], threads):
        if isinstance(result, UserError):
            failures.update(dict.fromkeys(str(result).splitlines()))
            continue
        failures.update(dict.fromkeys(_take(unit, arch, result)))
        for warning in result.warnings:
            if warning not in warnings:
                warnings.add(warning)
                say(f"warning: {warning}")
        if output is not None:
            suffix = "cubin" if arch.startswith("sm_") else "ptx"
            write(
                output / ".".join([unit.family, unit.file.path.stem, *unit.label.split(), arch, suffix]), result.image
            )
    return list(failures)


def _compiled(jobs: Sequence[tuple[Unit, str]], threads: int) -> Iterator[tuple[Unit, str, Compiled | UserError]]:
    """Each unit and architecture with its outcome, in order, while a bar on the terminal shows how far it is."""
    columns = (TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with ExitStack() as stack:
        progress = stack.enter_context(Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal))
        pool = ThreadPoolExecutor(threads)
        stack.callback(pool.shutdown, cancel_futures=True)  # after an interrupt nothing new is begun
        task = progress.add_task("", total=len(jobs))
        futures = [pool.submit(nvrtc.compile_kernels, unit.file.path, unit.defines, arch) for unit, arch in jobs]
        for (unit, arch), future in zip(jobs, futures, strict=True):
            progress.update(task, description=f"{unit.family} {unit.label} {arch}")
            try:
                yield unit, arch, future.result()
            except UserError as error:
                yield unit, arch, error
            progress.advance(task)


def _take(unit: Unit, arch: str, compiled: Compiled) -> list[str]:
    """Put what the compiler said into the unit's rows; what is wrong with functions that several kernels call."""
    if not arch.startswith("sm_"):
        return []
    failures = []
    for name, row in unit.rows.items():
        if name in compiled.resources:
            row.resources[arch] = compiled.resources[name]
        else:
            failures.append(
                f"{row.kernel} {row.variant} on {arch} compiles to nothing: an #if hides it in this variant"
            )
    return failures + [
        f"{unit.family} {unit.label} on {arch}: function {name} spills {found.spill_bytes} bytes: "
        "make it __forceinline__, or keep fewer values alive in it"
        for name, found in compiled.functions.items() if found.spill_bytes
    ]  # fmt: skip


def say(note: str) -> None:
    """A line on standard error, beside the progress."""
    notes.print(note, markup=False, highlight=False, soft_wrap=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be made: {error.strerror}; name another folder") from None
