"""What several commands share: how backends and threads are given, where output goes and what a table looks like."""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError, WriteError

PIPED_WIDTH = 10_000  # characters where no terminal says how many there are: a line in a file is not to be cut

console = Console()
notes = Console(stderr=True)  # progress and notes: standard output holds the result alone
if not console.is_terminal and "COLUMNS" not in os.environ:
    console = Console(width=PIPED_WIDTH)
# Columns that a narrow terminal does without, those first that are missed least.
SPARE = (
    "GB/s", "GFLOP/s", "predicted", "worst at", "err/uS", "us/token", "by", "inputs", "growth", "output", "inherited",
    "in its run", "exact", "to 1 ulp", "calls", "limit", "share", "MB", "MFLOP", "phase", "local", "gradient",
)  # fmt: skip
FOLDED = 40  # characters that a column gets which may run over several lines: formulas, places


def plain_table(*header: str, **options: Any) -> Table:
    """A table of few lines; its first column is never cut. `minibert.cli.legend.show` prints it."""
    table = Table(*header, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left", **options)
    if table.columns:
        table.columns[0].no_wrap = True
    return table


def folded(over_lines: bool) -> Literal["fold", "ellipsis"]:
    """How a column of a table takes what is too long for it: over several lines, or not at all."""
    return "fold" if over_lines else "ellipsis"


def fit(table: Table) -> list[str]:
    """Take columns of SPARE out of a table until it is as narrow as the terminal; returns the names of those."""
    left = []
    for name in SPARE:
        if _width(table) <= console.width:
            break
        kept = [c for c in table.columns if str(c.header) != name and not str(c.header).endswith(f" {name}")]
        if len(kept) < len(table.columns):
            left.append(name)
        for number, column in enumerate(kept):
            column._index = number  # of the column's place, which rich looks up for its padding
        table.columns = kept
    return left


def _width(table: Table) -> int:
    """Of its longest row, in characters."""
    long = [column for column in table.columns if column.overflow == "fold" and column.max_width is None]
    for column in long:
        column.max_width = FOLDED
    found = Measurement.get(console, console.options.update(width=PIPED_WIDTH), table).maximum
    for column in long:
        column.max_width = None
    return found


COMPARE_TITLE = "# minibert compare"  # the first line of what `compare --markdown` writes
KERNELS_TITLE = "# CUDA kernels: what each takes of a GPU"  # and of `kernels build --markdown`


def _is_json_result(path: Path) -> bool:
    """What `--json` writes, of every command and bench, names the machine, or the NVRTC that compiled."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and not found.keys().isdisjoint(("machine", "nvrtc"))


def _start(path: Path) -> str:
    return _first_bytes(path).decode("utf-8", "replace")


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(1000)
    except OSError:
        return b""


# Imported late: every command has these options, and few need what a model needs.
def _is_trace(path: Path) -> bool:
    from minibert.lab.lockstep.trace import is_trace

    return is_trace(path)


def _is_part_of_a_model(path: Path) -> bool:
    from minibert.data.tokenizer import FILES
    from minibert.model.checkpoint import CONFIG, INDEX, OTHER_WEIGHTS

    return path.name in {*FILES, CONFIG, INDEX} or path.suffix in OTHER_WEIGHTS


# By kind: whether a file is an earlier result of it. Rows are added to a CSV, and the bench looks at its columns.
EARLIER_RESULT: dict[str, Callable[[Path], bool]] = {
    "trace": _is_trace,
    "json": _is_json_result,
    "markdown": lambda path: _start(path).startswith((COMPARE_TITLE, KERNELS_TITLE)),
    "page": lambda path: "<title>minibert: " in _start(path),
    "csv": lambda path: True,
    "picture": lambda path: _first_bytes(path).startswith((b"\x89PNG", b"<?xml", b"%PDF")),
    "npy": lambda path: _first_bytes(path).startswith(b"\x93NUMPY"),
    "jsonl": lambda path: _start(path).startswith('{"text": '),
    "tsv": lambda path: re.match(r"-?\d+\.\d{4}[\t\n]", _start(path)) is not None,
}


def refuse_unwritable(**files: Path | None) -> None:
    """Raise UserError for a file that could not be written, or must not be: before the work, not after it.

    `files` are named by a kind of EARLIER_RESULT: what is there already is replaced only by a result of its own kind.
    """
    for kind, path in files.items():
        is_earlier_result = EARLIER_RESULT[kind]
        if path is None:
            continue
        if path.is_dir():
            raise UserError(f"{path} is a folder: name a file")
        existing = path if path.exists() else path.resolve().parent
        if not existing.exists():
            raise UserError(f"{path}: there is no folder {existing}; make it first")
        if not os.access(existing, os.W_OK):
            raise WriteError(f"{path} cannot be written: {existing} is read-only for you; name another file")
        if path.is_file() and path.stat().st_size and not is_earlier_result(path):
            what = "part of a model" if _is_part_of_a_model(path) else f"no {kind} that minibert wrote"
            raise UserError(f"{path} is {what}, which is not replaced: name another file")


Command = TypeVar("Command", bound=Callable[..., Any])


def takes_options_of(source: Callable[..., Any], *without: str) -> Callable[[Command], Command]:
    """A command whose `**options` are the parameters of another function, less some: they are written down once."""

    def extend(command: Command) -> Command:
        own, more = (inspect.signature(each, eval_str=True).parameters for each in (command, source))
        taken = {name: one for name, one in own.items() if one.kind is not one.VAR_KEYWORD}
        taken |= {name: one for name, one in more.items() if name not in {*taken, *without}}
        # What typer reads. Keywords, for an option that is required may stand after one that is not.
        found = inspect.Signature([one.replace(kind=one.KEYWORD_ONLY) for one in taken.values()])
        command.__signature__ = found  # type: ignore[attr-defined]
        command.__annotations__ = {name: one.annotation for name, one in taken.items()}
        return command

    return extend


BACKENDS = ("--backend", "--backends")  # both are taken wherever a backend or several are named
OWN_HELP = "One of your own is FILE.py:NAME or package.module:NAME."


def refuse_repeated(words: Sequence[str]) -> None:
    """Raise UserError where a command line names its backends twice: all but the last would go unheeded."""
    given = [word for word in words if word.partition("=")[0] in BACKENDS]
    if len(given) > 1:
        raise UserError(
            f"expected {BACKENDS[0]} once (several backends as in numpy,numba), got {' and '.join(given)}; "
            f"{BACKENDS[1]} is the same option"
        )


def chosen_backends(names: str | None, threads: int | None) -> list[Backend]:
    """The backends of `a,b`, or all that runs here and need not be named. Raises UserError and BackendUnavailable."""
    if threads is not None:
        backends.set_num_threads(threads)
    if names is None:
        return backends.usual()
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    found = [backends.get(name) for name in wanted]
    if not found or len({place.name for place in found}) != len(found):
        raise UserError(f"--backend: expected names such as numpy,numba, each once, got {names!r}")
    return found


PRODUCTS_HELP = "How products of float32 are computed: float32, or on a GPU and the emulator tf32 (tensor cores)."


def set_products(places: list[Backend], mode: str) -> None:
    """Set the mode of products on the backends that have it. Raises UserError where none has."""
    able = [place for place in places if mode in place.product_modes]
    if not able:
        known = sorted({m for place in places for m in place.product_modes})
        raise UserError(
            f"--products: expected {' or '.join(known)} on {', '.join(p.name for p in places)}, got {mode!r}"
        )
    for place in able:
        place.product_mode = mode


DTYPE_HELP = "float32, bfloat16, float64 (not on a GPU), float16 (not on numba)."
DETERMINISTIC_HELP = "Bit-identical results over runs and numbers of threads, on the backends of the CPU."


def machine() -> dict[str, Any]:
    """What a figure was measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {"system": platform.platform(), "processor": named, "cores": cores, "python": platform.python_version()}
