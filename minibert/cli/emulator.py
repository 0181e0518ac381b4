"""Options of commands that run on the emulator: in which order, what to look for, where to stop, what to count."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.table import Table

from minibert.backends import Backend
from minibert.cli.options import notes, plain_table
from minibert.errors import UserError
from minibert.kernels.gpu.launch import INCLUDE

NAME = "emulator"
STOP = re.compile(r"(.+):([1-9]\d*)(?: if .+)?")  # where gdb stops, and under which condition
SCHEDULES_HELP = "Emulator: orders of blocks, warps and lanes, as in forward,reverse,random; default: all three."
SANITIZE_HELP = "Emulator: look for races, bounds, unwritten memory, divergent barriers; default: yes."
TRAFFIC_HELP = "Emulator: show the sectors and bank conflicts of each line of the kernels."
TRAFFIC_COLUMNS = {  # what `check --traffic` counts
    "requests": "of warps", "sectors": "of 32 bytes, moved", "ideal": "those that the bytes asked for would fill",
    "wasted": "the rest", "bank conflicts": "turns that a request takes",
}  # fmt: skip
GDB_HELP = "Emulator: stop in a kernel at FILE:LINE, as in softmax/gpu.cu:41, under gdb."


@contextmanager
def emulator_options(
    places: Sequence[Backend], schedules: str | None, sanitize: bool, traffic: bool = False, gdb: str | None = None
) -> Iterator[Any]:
    """Set the emulator up for the length of a `with` block, and give its backend; None where it is not among `places`.

    The emulator itself is compiled first: what is missing for it is told before any work, as BackendUnavailable.
    Raises UserError for a schedule that is not known, a place to stop at that is none, and for options where there is
    no emulator.
    """
    backend: Any = next((place for place in places if place.name == NAME), None)
    if backend is None:
        if schedules is not None or traffic or gdb is not None or not sanitize:
            raise UserError("--schedules, --no-sanitize, --traffic and --gdb go with --backend emulator")
        yield None
        return
    from minibert.backends.emulator.driver import SCHEDULES
    from minibert.backends.emulator.toolchain import emulator_executable

    chosen = [name.strip() for name in schedules.split(",")] if schedules is not None else list(SCHEDULES)
    if not set(chosen) <= set(SCHEDULES):
        raise UserError(f"--schedules: expected some of {','.join(SCHEDULES)}, got {schedules!r}")
    if gdb is not None and not STOP.fullmatch(gdb):
        raise UserError(f"--gdb: expected FILE:LINE, as in softmax/gpu.cu:41, got {gdb!r}")
    emulator_executable()
    driver, before = backend.emulator, backend.schedules
    backend.schedules = chosen
    driver.gdb = gdb
    try:
        with driver.set(sanitize=sanitize, traffic=traffic, schedule=chosen[0]):
            driver.traffic.clear()
            driver.notes.clear()
            driver.sources.clear()
            yield backend
        for note in driver.notes.values():
            notes.print(f"note: {note}", markup=False, highlight=False, soft_wrap=True)
        if gdb is not None:
            _refuse_elsewhere(gdb, driver.sources)
    finally:
        backend.schedules = before


def _refuse_elsewhere(gdb: str, sources: Iterable[Path]) -> None:
    """Raise UserError for a place in no file of the kernels that ran: gdb would have waited for it for ever."""
    from minibert.backends.emulator.findings import short
    from minibert.backends.emulator.toolchain import included

    found = STOP.fullmatch(gdb)
    assert found is not None
    named, line = Path(found[1]).parts, int(found[2])
    files = {file for source in sources for file in (source, *included(source, INCLUDE))}
    meant = [file for file in files if file.absolute().parts[-len(named) :] == named]
    if not meant:
        ran = ", ".join(sorted(short(str(source.absolute())) for source in sources)) or "none"
        raise UserError(f"--gdb {gdb}: no kernel that ran is of such a file; they are of {ran}")
    if all(len(file.read_text(encoding="utf-8").splitlines()) < line for file in meant):
        raise UserError(f"--gdb {gdb}: {short(str(meant[0].absolute()))} has fewer lines")


def traffic_table(driver: Any) -> Table:
    """A row for each line of a kernel that touches memory: the most wasteful first."""
    from minibert.backends.emulator.findings import short

    table = plain_table("line", "space", "access", "requests", "bytes", "sectors", "ideal", "wasted", "bank conflicts")
    lines = sorted(driver.traffic.values(), key=lambda t: (t.ideal_sectors - t.sectors, t.file, t.line))
    for t in lines:
        shared = t.space == "shared"
        wasted = "" if shared or not t.sectors else f"{1 - t.ideal_sectors / t.sectors:.0%}"
        table.add_row(
            f"{short(t.file)}:{t.line}", t.space, t.access, str(t.requests), str(t.bytes),
            "" if shared else str(t.sectors), "" if shared else str(t.ideal_sectors), wasted,
            f"{t.bank_conflict_ways:.2g} ways" if shared else "",
        )  # fmt: skip
    return table
