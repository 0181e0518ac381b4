"""What each CUDA kernel takes of a GPU: held to a budget that is kept beside the sources, and shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from minibert.backends.cuda import nvrtc
from minibert.backends.cuda.nvrtc import Resources
from minibert.cli.options import KERNELS_TITLE, plain_table
from minibert.errors import UserError, pip_install

BUDGET = nvrtc.KERNELS.parent / "bench" / "kernel_budget.json"  # in a clone; an installed package has none
REFRESH = "minibert kernels build --update-budget --markdown docs/kernels.md"
BUDGETED = ("registers", "shared_bytes", "stack_bytes")
ANY_STORAGE = "any"  # the variant of a kernel whose parameters do not depend on the storage type

REGISTER_STEP = 8  # registers are handed out to a thread by eights: below that nothing changes on a GPU
REGISTERS = 65536  # of a multiprocessor, on every architecture below
WARP = 32
# Warps, blocks and bytes of shared memory of a multiprocessor: CUDA C++ Programming Guide, "Compute Capabilities"
MULTIPROCESSOR = {
    "sm_80": (64, 32, 164 << 10),
    "sm_86": (48, 16, 100 << 10),
    "sm_89": (48, 24, 100 << 10),
    "sm_90": (64, 32, 228 << 10),
    "sm_100": (64, 32, 228 << 10),
}
BLOCK_SHARED = 1024  # bytes of shared memory that the system takes for each block

Budget = dict[str, dict[str, dict[str, dict[str, int]]]]  # kernel -> variant -> architecture -> resource


@dataclass
class Row:
    """A kernel in one of its variants, and what it takes on each architecture that it was compiled for."""

    kernel: str  # "softmax/softmax_warp"
    variant: str  # "float16", "float16 HEAD_SIZE=64"
    threads: int  # of a block
    resources: dict[str, Resources] = field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------- judging


def spills(rows: Iterable[Row]) -> list[str]:
    """A line for each kernel that has too few registers for its values."""
    return [
        f"{row.kernel} {row.variant} on {arch} spills {used.spill_bytes} bytes with {used.registers} registers: keep "
        f"fewer values alive in a thread, or allow it more registers by __launch_bounds__ ({row.threads} threads)"
        for row in rows for arch, used in row.resources.items() if used.spill_bytes
    ]  # fmt: skip


def differences(rows: Sequence[Row], budget: Budget, complete: bool = True) -> list[str]:
    """A line for each kernel that the budget lacks; if `rows` are all there are, for each that is no more."""
    known_archs = budgeted(budget)
    found = [
        f"{row.kernel} {row.variant} on {arch} is not in the budget: `{REFRESH}` adds it"
        for row in rows for arch in row.resources
        if arch in known_archs and arch not in budget.get(row.kernel, {}).get(row.variant, {})
    ]  # fmt: skip
    present = {(row.kernel, row.variant) for row in rows}
    named = [(kernel, variant) for kernel, variants in budget.items() for variant in variants]
    gone = [name for name in named if name not in present] if complete else []
    return found + [f"{kernel} {v} is in the budget but in no launch table: `{REFRESH}` drops it" for kernel, v in gone]


def excesses(rows: Iterable[Row], budget: Budget) -> list[str]:
    """A line for each figure above the budget; of use with the NVRTC that it was written with, since others differ."""
    return [
        f"{row.kernel} {row.variant} on {arch} {excess}"
        for row in rows for arch, used in row.resources.items()
        for excess in _excesses(used, budget.get(row.kernel, {}).get(row.variant, {}).get(arch))
    ]  # fmt: skip


def _excesses(used: Resources, allowed: dict[str, int] | None) -> list[str]:
    found: list[str] = []
    if allowed is None:
        return found
    if used.registers > _rounded(allowed["registers"]):
        found.append(
            f"takes {used.registers} registers, over the budget of {_rounded(allowed['registers'])}: keep fewer values "
            f"alive in a thread, or accept it by `{REFRESH}`"
        )
    if used.stack_bytes > allowed["stack_bytes"]:
        found.append(
            f"takes {used.stack_bytes} bytes of stack, over the budget of {allowed['stack_bytes']}: index arrays by "
            f"constants only (#pragma unroll), or accept it by `{REFRESH}`"
        )
    if used.shared_bytes > allowed["shared_bytes"]:
        found.append(
            f"takes {used.shared_bytes} bytes of static shared memory, over the budget of {allowed['shared_bytes']}: "
            f"shrink its arrays, or accept it by `{REFRESH}`"
        )
    return found


def _rounded(registers: int) -> int:
    return -(-registers // REGISTER_STEP) * REGISTER_STEP


def resident_warps(used: Resources, threads: int, arch: str) -> int | None:
    """Warps that a multiprocessor holds at most, as far as registers and static shared memory allow; None: unknown."""
    if arch not in MULTIPROCESSOR:
        return None
    most_warps, most_blocks, shared = MULTIPROCESSOR[arch]
    warps = -(-threads // WARP)
    by_registers = REGISTERS // (max(1, _rounded(used.registers)) * WARP) // 4 * 4 // warps  # in each of four quarters
    by_shared = shared // (used.shared_bytes + BLOCK_SHARED)
    return warps * min(most_warps // warps, most_blocks, by_registers, by_shared)


def read_budget(path: Path) -> tuple[Budget, str]:
    """The budget in a file, and the version of NVRTC that it was written with; nothing where there is none.

    Raises UserError for a file that is no budget.
    """
    if not path.is_file():
        return {}, ""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        budget: Budget = read["kernels"]
        all_figures = [f for variants in budget.values() for archs in variants.values() for f in archs.values()]
        if not all(isinstance(figures[name], int) for figures in all_figures for name in BUDGETED):
            raise ValueError
        return budget, str(read["nvrtc"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no budget of kernels: restore it, or delete it and run `{REFRESH}`") from None


def budgeted(budget: Budget) -> set[str]:
    """The architectures that a budget knows."""
    return {arch for variants in budget.values() for archs in variants.values() for arch in archs}


def updated(budget: Budget, rows: Iterable[Row], complete: bool) -> Budget:
    """The budget that these rows just meet; where only some families were compiled, the others keep theirs."""
    fresh: Budget = {}
    compiled = set()
    for row in rows:
        compiled.add(row.kernel.partition("/")[0])
        before = budget.get(row.kernel, {}).get(row.variant, {})
        figures = {arch: {name: getattr(used, name) for name in BUDGETED} for arch, used in row.resources.items()}
        if before or figures:  # neither, where a new file does not compile
            fresh.setdefault(row.kernel, {})[row.variant] = {**before, **figures}
    kept = {} if complete else {k: v for k, v in budget.items() if k.partition("/")[0] not in compiled}
    return {**kept, **fresh}


def write_budget(path: Path, budget: Budget, version: str) -> None:
    """A line for each kernel and variant, in order, so that a change reads as one."""
    lines = []
    for kernel in sorted(budget):
        inner = [f"   {json.dumps(v)}: {json.dumps(budget[kernel][v], sort_keys=True)}" for v in sorted(budget[kernel])]
        lines.append(f"  {json.dumps(kernel)}: {{\n" + ",\n".join(inner) + "\n  }")
    body = ",\n".join(lines)
    write(path, f'{{\n "nvrtc": "{version}",\n "kernels": {{\n{body}\n }}\n}}\n')


# ------------------------------------------------------------------------------------------------------------ showing


MEANINGS = {
    "variant": "storage type and constants", "threads": "of a block", "registers": "of a thread",
    "warps": "that a multiprocessor holds at most", "shared": "bytes of a block", "stack": "bytes of a thread",
    "spilled": "bytes that no register was left for",
}  # fmt: skip


def _header(archs: Sequence[str]) -> list[str]:
    figures = ("registers", "warps", "shared", "stack", "spilled")
    return ["kernel", "variant", "threads", *(f"{arch} {figures[0]}" if i == 0 else f for arch in archs
            for i, f in enumerate(figures))]  # fmt: skip


def _cells(row: Row, archs: Sequence[str]) -> list[str]:
    cells = [row.kernel, row.variant, str(row.threads)]
    for arch in archs:
        used = row.resources.get(arch)
        if used is None:  # it did not compile
            cells += [""] * 5
            continue
        warps = resident_warps(used, row.threads, arch)
        figures = (used.registers, "" if warps is None else warps, used.shared_bytes, used.stack_bytes)
        cells += [*map(str, figures), str(used.spill_bytes)]
    return cells


def table(rows: Iterable[Row], archs: Sequence[str]) -> Table:
    shown = plain_table()
    for i, name in enumerate(_header(archs)):
        shown.add_column(name, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for row in rows:
        shown.add_row(*_cells(row, archs))
    return shown


def markdown(rows: Iterable[Row], archs: Sequence[str], version: str) -> str:
    """The page docs/kernels.md."""
    line: Callable[[Iterable[str]], str] = lambda cells: f"| {' | '.join(cells)} |"  # noqa: E731
    header = _header(archs)
    return "\n".join([
        KERNELS_TITLE, "",
        f"Compiled by NVRTC {version} without a GPU; no figure here was measured on one. Refreshed, together with the",
        "budget `bench/kernel_budget.json` that `minibert kernels build` holds every kernel to, by", "",
        f"    {pip_install('-e', '.[nvrtc]')}", f"    {REFRESH}", "",
        "- threads: of a block.",
        "- registers: of a thread. They are handed out by eights, so the budget is rounded up to eights.",
        "- warps: the most that a multiprocessor holds, as far as registers and static shared memory allow; dynamic",
        "  shared memory, chosen at launch, may allow fewer.",
        "- shared: bytes of static shared memory of a block; stack: bytes of local memory of a thread.",
        "- spilled: bytes of registers moved to memory and back, as code; anything but 0 fails the build.",
        f"- variant: the type that arrays are stored in (`{ANY_STORAGE}`: no array of the kernel follows it), and the",
        "  other constants that the kernel is compiled with.", "",
        line(header), line(["---", "---", *["---:"] * (len(header) - 2)]),
        *(line(_cells(row, archs)) for row in rows), "",
    ])  # fmt: skip


def facts(rows: Iterable[Row], failures: list[str], version: str) -> dict[str, Any]:
    """All figures, for `--json`."""
    kernels = [
        {
            "kernel": row.kernel, "variant": row.variant, "threads": row.threads, "arch": arch, **used._asdict(),
            "resident_warps": resident_warps(used, row.threads, arch),
        }
        for row in rows for arch, used in row.resources.items()
    ]  # fmt: skip
    return {"nvrtc": version, "flags": list(nvrtc.FLAGS), "kernels": kernels, "failures": failures}


def write(path: Path, content: str | bytes) -> None:
    try:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; name another") from None
