"""What the emulator found in a launch, as a reader wants it: file and line, kernel, block, thread, both accesses."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from minibert.backends.emulator.toolchain import Uninitialised
from minibert.kernels.gpu.launch import INCLUDE

SHIM = Path(__file__).parent / "include"
SHARED_HEADERS = INCLUDE[1].resolve()

# What is told and is no mistake: a result that does not depend on the order, a number that a GPU defines.
NOTES = ("same value written", "float beyond an integer", "perhaps uninitialised")

COUNTS = ("requests", "bytes", "sectors", "ideal_sectors", "passes", "ideal_passes")  # of TrafficLine

Coordinates = tuple[int, int, int]


class Line(NamedTuple):
    """A line of source."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{short(self.file)}:{self.line}"


class OtherAccess(NamedTuple):
    """The earlier of two accesses, or the other thread of two that should have met."""

    file: str
    line: int
    access: str
    block: Coordinates | None
    thread: Coordinates | None


@dataclass(frozen=True)
class Finding:
    """One mistake of a kernel, with the number of times that it was seen."""

    kind: str  # "race", "out of bounds", "uninitialised read", ...
    file: str
    line: int
    kernel: str
    block: Coordinates | None
    thread: Coordinates | None
    access: str  # "read", "write", "atomic write", or empty
    space: str  # "global", "shared", or empty
    other: OtherAccess | None
    detail: str
    count: int
    bytes: int = 0
    callers: tuple[Line, ...] = ()  # where `line` is in an inlined function: the calls, outermost last

    @property
    def is_note(self) -> bool:
        return self.kind in NOTES

    def __str__(self) -> str:
        by = f"thread {_show(self.thread)} of block {_show(self.block)}" if self.thread or self.block else ""
        text = f"{short(self.file)}:{self.line}: {self.kind}"
        text += f" in {self.space} memory" if self.space else ""
        text += f": {self.access} of {self.bytes} bytes by {by}" if self.access else f": {by}" if by else ""
        if self.other is not None:
            text += self._against(self.other)
        text += f" ({self.detail})" if self.detail else ""
        for caller in self.callers:
            text += f", called at {caller}"
        return text + f" [kernel {self.kernel}, seen {self.count} time{'s' if self.count > 1 else ''}]"

    def _against(self, other: OtherAccess) -> str:
        where = f"{short(other.file)}:{other.line}"
        who = f"thread {_show(other.thread)}"
        if other.block != self.block:
            who += f" of block {_show(other.block)}"
        return f" after an unordered {other.access} by {who} at {where}" if other.access else f" and {who} at {where}"


@dataclass(frozen=True)
class TrafficLine:
    """What one line of source moved: summed over its requests, each by one warp."""

    file: str
    line: int
    space: str  # "global" or "shared"
    access: str  # "read" or "write"
    requests: int
    bytes: int  # distinct bytes that the lanes asked for
    sectors: int  # of 32 bytes, moved; 0 for shared memory
    ideal_sectors: int  # that would hold these bytes
    passes: int = 0  # shared memory: over the banks; each gives one word in a pass
    ideal_passes: int = 0  # without conflicts

    @property
    def bank_conflict_ways(self) -> float:
        """Passes over the banks for each that would do: 1 without conflicts, and for global memory."""
        return self.passes / self.ideal_passes if self.ideal_passes else 1.0

    def plus(self, other: TrafficLine) -> TrafficLine:
        """The sum with what another launch moved at the same line."""
        summed = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        return replace(self, **summed)

    def __str__(self) -> str:
        text = f"{short(self.file)}:{self.line}: {self.space} {self.access}, {self.requests} requests, "
        if self.space == "shared":
            return text + f"{self.bytes} bytes, {self.bank_conflict_ways:.1f}-way bank conflicts"
        return text + f"{self.bytes} bytes in {self.sectors} sectors (ideal {self.ideal_sectors})"


def short(file: str) -> str:
    """A file as messages show it: with its folder."""
    return "/".join(Path(file).parts[-2:])


def read_findings(reports: Iterable[Mapping[str, Any]], kernel: str) -> list[Finding]:
    """The emulator's JSON -> findings; those of one line (an unrolled loop, two inlined copies) are one.

    Races come first: an unwritten read may be one's consequence.
    """
    reports = list(reports)
    lines = find_lines(pc for report in reports for pc in (report["pc"], (report["other"] or {}).get("pc", "")))
    merged: dict[tuple[Any, ...], Finding] = {}
    for report in reports:
        place = lines.get(report["pc"], ())
        at = place[0] if place else Line("?", 0)
        finding = Finding(
            *(report["kind"], at.file, at.line, kernel, _coordinates(report["block"]), _coordinates(report["thread"])),
            *(report["access"], report["space"], _other(report["other"], lines), report["detail"], report["count"]),
            bytes=report["bytes"],
            callers=place[1:],
        )
        other = finding.other
        key = (finding.kind, finding.file, finding.line, finding.access, other and (other.file, other.line))
        known = merged.get(key)
        merged[key] = finding if known is None else replace(known, count=known.count + finding.count)
    # an index beyond a shared array is told by the compiler's own check as well: once is enough
    seen = {(f.kind, f.file, f.line) for f in merged.values() if f.access}
    found = [f for f in merged.values() if f.access or (f.kind, f.file, f.line) not in seen]
    races = {(f.file, f.line) for f in found if f.kind == "race"}
    found = [f for f in found if not (f.is_note and (f.file, f.line) in races)]
    return sorted(found, key=lambda finding: finding.kind != "race")


def unset_variable(told: Uninitialised, kernel: str) -> Finding:
    kind = "uninitialised variable" if told.certain else "perhaps uninitialised"
    path = "" if told.certain else " on some path"
    detail = f"{told.variable} is read{path} before it has a value"
    return Finding(kind, told.file, told.line, kernel, None, None, "", "", None, detail, 1)


STANDING = {  # of one thread, of several
    "ready": ("waits for its turn", "wait for their turn"), "done": ("has returned", "have returned"),
    "barrier": ("waits at the barrier of {}", "wait at the barrier of {}"),
    "warp": ("waits for its warp at {}", "wait for their warp at {}"),
}  # fmt: skip


def without_end(findings: Sequence[Finding], told: Mapping[str, Any]) -> tuple[str, list[Finding]]:
    """Where the threads of an endless launch stand, in words; and the findings, the last of which says so.

    `told`: `stacks`, the places of the running thread at some moments, innermost first; `others` of its block; `ended`
    of `blocks` have run to their end.
    """
    *before, running = findings
    lines = find_lines(place for stack in told["stacks"] for place in stack)
    seen = [[line for place in stack for line in lines.get(place, ())] for stack in told["stacks"]]
    seen = [stack for stack in seen if stack]
    text = f"thread {_show(running.thread)} of block {_show(running.block)} goes round"
    if seen:  # the lines of the kernel itself, and of the function that it calls where that is one
        file = seen[-1][-1].file
        own = sorted({stack[-1].line for stack in seen if stack[-1].file == file})
        inner = {stack[0] for stack in seen}
        text += f" in {short(file)}:{own[0]}" + (f"-{own[-1]}" if len(own) > 1 else "")
        text += f", called to {inner.pop()}" if len(inner) == 1 and seen[-1][0] not in {s[-1] for s in seen} else ""
        running = replace(running, file=file, line=own[0])
    for group in told["others"]:
        several = group["first"] != group["last"]
        who = f"threads {group['first']}-{group['last']}" if several else f"thread {group['first']}"
        where = f"{short(group['file'])}:{group['line']}" if "file" in group else ""
        text += f", {who} {STANDING[group['state']][several].format(where)}"
    waiting = told["blocks"] - told["ended"] - 1
    if told["blocks"] > 1:
        text += f"; {told['ended']} of {told['blocks']} blocks have ended, {waiting} wait for their turn"
    return text, [*before, replace(running, detail=text)]


def read_traffic(reports: Iterable[Mapping[str, Any]]) -> list[TrafficLine]:
    """The emulator's JSON -> traffic by source line, in the order of the source."""
    reports = list(reports)
    lines = find_lines(report["pc"] for report in reports)
    summed: dict[tuple[Line, str, str], TrafficLine] = {}
    for report in reports:
        place = lines.get(report["pc"]) or (Line("?", 0),)
        # `load(x + i)` of a header that all kernels share counts where it is called
        at = next((line for line in place if Path(line.file).resolve().parent != SHARED_HEADERS), place[0])
        key = (at, report["space"], report["access"])
        line = TrafficLine(*at, report["space"], report["access"], **{name: report[name] for name in COUNTS})
        summed[key] = summed[key].plus(line) if key in summed else line
    return [line for _, line in sorted(summed.items(), key=lambda item: item[0])]


def _other(report: Mapping[str, Any] | None, lines: Mapping[str, tuple[Line, ...]]) -> OtherAccess | None:
    if report is None:
        return None
    at = (lines.get(report["pc"]) or (Line("?", 0),))[0]
    return OtherAccess(
        at.file, at.line, report["access"], _coordinates(report["block"]), _coordinates(report["thread"])
    )


def _coordinates(values: list[int] | None) -> Coordinates | None:
    return None if values is None else (values[0], values[1], values[2])


def _show(coordinates: Coordinates | None) -> str:
    return "?" if coordinates is None else "({},{},{})".format(*coordinates)


def find_lines(places: Iterable[str]) -> dict[str, tuple[Line, ...]]:
    """Each "library+0x12" -> its line of source, then the lines that it was inlined at; the shim's own are left out."""
    wanted: dict[str, list[str]] = {}
    for place in set(places):
        library, plus, offset = place.rpartition("+")
        if plus:
            wanted.setdefault(library, []).append(offset)
    return {
        f"{library}+{offset}": lines
        for library, offsets in wanted.items()
        for offset, lines in _look_up(library, tuple(sorted(offsets))).items()
    }


@functools.lru_cache(maxsize=256)
def _look_up(library: str, offsets: tuple[str, ...]) -> dict[str, tuple[Line, ...]]:
    """Ask addr2line. A return address is the one after the call: the byte before it is the call's."""
    program = shutil.which("addr2line")
    if program is None:
        return {}
    asked = "".join(f"{int(offset, 16) - 1:#x}\n" for offset in offsets)
    command = [program, "-a", "-i", "-e", library]
    told = subprocess.run(command, input=asked, capture_output=True, text=True, check=False).stdout
    found: dict[str, list[Line]] = {}
    here: list[Line] = []
    for text in told.splitlines():
        if re.fullmatch(r"0x[0-9a-f]+", text):
            here = found.setdefault(f"{int(text, 16) + 1:#x}", [])
            continue
        line = re.fullmatch(r"(.+):(\d+)(?: \(discriminator \d+\))?", text)
        if line and int(line[2]) and not Path(line[1]).is_relative_to(SHIM):
            here.append(Line(line[1], int(line[2])))
    return {offset: tuple(found.get(f"{int(offset, 16):#x}", ())) for offset in offsets}
