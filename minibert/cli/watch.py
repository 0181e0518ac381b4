"""`minibert watch FILE`: save a kernel, and see whether it is right and how fast, in seconds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.markup import escape

import minibert.kernels
from minibert import backends
from minibert.backends import Backend
from minibert.cli import app
from minibert.cli.legend import ULP_HELP
from minibert.cli.options import BACKENDS, OWN_HELP, console, notes
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.lab.conform.check import find_op
from minibert.lab.conform.own_kernels import load_kernels

KERNELS = Path(str(minibert.kernels.__file__)).resolve().parent
POLL_SECONDS = 0.2
SOURCES = (".py", ".cu", ".cuh", ".h")


class Watched(NamedTuple):
    """The files, the ops that they are of, where, in which dtypes (none: the usual ones), and --kernel's specs."""

    files: list[Path]
    ops: list[str]
    backend: Backend
    dtypes: list[str]
    specs: list[str]


@app.command("watch")
def watch_command(
    kernels: list[str] = typer.Argument(
        metavar="FILE", help="A kernel's file, as kernels/softmax/gpu.cu, or FILE.py:FUNCTION=OP for one of your own."
    ),
    backend: str = typer.Option(
        None, *BACKENDS, show_default="numba for cpu.py; cupy, else emulator, for CUDA", help=f"Where. {OWN_HELP}"
    ),
    dtype: str = typer.Option(None, show_default="float32", help="As in float32,bfloat16."),
    ulp: bool = typer.Option(False, "--ulp", help=ULP_HELP),
    once: bool = typer.Option(False, "--once", help="Look once, and end: exit status 1 if a check fails."),
) -> int:
    """Check and time a kernel each time that its file is saved: formula, gradient, change in speed, share of the limit.

    Ctrl-C ends it.
    """
    watched = resolve(kernels, backend, dtype)
    console.print(
        f"watching {', '.join(_short(f) for f in watched.files)}: {', '.join(watched.ops)} on {watched.backend.name}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    peaks: dict[str, Any] | None = None
    last: dict[str, dict[str, Any]] = {}
    while True:
        seen = _stamps(watched.files)
        peaks, looks, problem = _look(watched, peaks)
        for look in looks:
            console.print(line(look, last.get(look["op"]), ulp), highlight=False, soft_wrap=True)
            if look["ok"]:
                last[look["op"]] = look
        if problem:
            console.print(f"[red]FAIL[/red] {escape(problem)}", highlight=False, soft_wrap=True)
        if once:
            return 1 if problem or not all(look["ok"] for look in looks) else 0
        while _stamps(watched.files) == seen:
            time.sleep(POLL_SECONDS)


def resolve(kernels: Sequence[str], backend: str | None, dtype: str | None = None) -> Watched:
    """What to watch. Raises UserError for a file that is not there, lacks the function or is of no known op."""
    files: list[Path] = []
    ops: list[str] = []
    specs: list[str] = []
    for given in kernels:
        place, _, op = given.partition("=")
        name, _, function = place.partition(":")
        path = Path(name)
        if not path.is_file():
            raise UserError(f"{name}: there is no such file; expected a kernel's file or FILE.py:FUNCTION=OP")
        path = path.resolve()
        if op:
            if not function:
                raise UserError(f"expected FILE.py:FUNCTION=OP, got {given!r}")
            specs.append(given)
            ops.append(op)
        else:
            ops += [found for found in ops_of(path) if found not in ops]
        files += [file for file in sorted(path.parent.iterdir()) if file.suffix in SOURCES]
    cuda = any(file.suffix == ".cu" for file in files) and not all(Path(g).name == "cpu.py" for g in kernels)
    where = backends.get(_fitting(cuda) if backend is None else backend)
    dtypes = [name.strip() for name in dtype.split(",")] if dtype is not None else []
    for each in dtypes:
        where.require_dtype(each)
    try:
        load_kernels(specs)
    except UserError as error:
        if error.__cause__ is None:  # else the file does not run, which the next save may mend
            raise UserError(_plain(error)) from None
    return Watched(list(dict.fromkeys(files)), [find_op(op).name for op in ops], where, dtypes, specs)


def ops_of(path: Path) -> list[str]:
    """The ops whose kernels a file of the package is about. Raises UserError for a file from elsewhere."""
    if KERNELS not in path.parents or path.parent in (KERNELS, KERNELS / "cpu", KERNELS / "gpu"):
        raise UserError(f"{path.name} is in no folder of {KERNELS}: say which op it is of, as FILE.py:FUNCTION=OP")
    launches = path if path.suffix == ".py" else path.with_name("gpu.py")
    tree = ast.parse(launches.read_text(encoding="utf-8"))
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in OPS]
    if not found:
        raise UserError(f"{_short(launches)} has no kernel of an op")
    return found


def _fitting(cuda: bool) -> str:
    if not cuda:
        return "numba"
    status = {s.name: s for s in backends.available()}
    return "cupy" if status["cupy"].backend is not None else "emulator"


def _look(watched: Watched, peaks: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[dict[str, Any]], str]:
    """One look in a process of its own: the peaks, a look at each op, and what went wrong beside them."""
    command = [
        sys.executable, "-m", "minibert.cli.look", backends.spec_of(watched.backend), ",".join(watched.ops),
        ",".join(watched.dtypes), json.dumps(peaks), *watched.specs,
    ]  # fmt: skip
    with notes.status("compiling and checking ..."):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(text) for text in done.stdout.splitlines() if text.startswith(("{", "null"))]
    problem = ""
    if done.returncode:
        said = [text for text in done.stderr.splitlines() if text.strip()]
        problem = (
            _plain(said[-1].removeprefix("minibert.errors.UserError: ")) if said else f"exit status {done.returncode}"
        )
    return (lines[0] if lines else peaks), lines[1:], problem


def _plain(problem: object) -> str:
    """What is wrong with a kernel, without the option by which other commands are given it."""
    return str(problem).removeprefix("--kernel: ")


def line(look: dict[str, Any], before: dict[str, Any] | None, ulp: bool = False) -> str:
    """A line for one op: the verdict first, then figures, each with its change."""
    clock = time.strftime("%H:%M:%S")
    if not look["ok"]:
        return f"{clock} [red]FAIL[/red] {look['op']} after {look['checks']} checks: {escape(look['message'])}"
    parts = [f"{clock} [green]ok[/green]   {look['op']} ({look['by']}, {look['checks']} checks)"]
    if look["bound_share"] is not None:
        ulps = f"{look['ulp_max']:.3g} ulp, " if ulp else ""
        parts.append(f"{ulps}{look['bound_share']:.1%} of the bound")
    if look["gradient"]:
        parts.append(f"gradient {look['gradient']}")
    if look["seconds"] is not None:
        change = _change(look["seconds"], before["seconds"] if before else None)
        share = look["limit_share"]
        limit = "" if share is None else f", {share:.0%} of the limit"
        if share is not None and share > 1:
            limit = ", faster than memory: the data fit a cache"
        parts.append(f"{look['seconds'] * 1e3:.3f} ms{change}{limit}")
    if look["sectors"]:
        change = _change(look["sectors"], before["sectors"] if before else None)
        parts.append(f"{look['sectors']} sectors{change}, {look['ideal_sectors'] / look['sectors']:.0%} of them needed")
    return "; ".join(parts)


def _change(now: float, before: float | None) -> str:
    return "" if not before else f" ({now / before - 1:+.0%})"


def _stamps(files: Sequence[Path]) -> list[tuple[int, int] | None]:
    return [(s.st_mtime_ns, s.st_size) if (s := _stat(file)) else None for file in files]


def _stat(file: Path) -> Any:
    try:
        return file.stat()
    except OSError:  # between an editor's removing the old and writing the new
        return None


def _short(path: Path) -> str:
    return "/".join(path.parts[-2:])
