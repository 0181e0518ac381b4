"""Everything there is to learn on a GPU, in one run of under nine minutes: `make gpu-check`.

Correctness first, then speed: what is here; kernels compiled; every op against its formula; compute-sanitizer; a tiny
training run; this device's peaks; each kernel against its floor; parity with transformers; training steps of BERT-base
beside PyTorch. Each part runs in a process of its own (part.py), so that none takes another with it; results so far are
always on disk, in bench/results (README.md there says what the names mean).

Exit status 0 if all that was checked is right, 1 if something is not, 2 where there is no GPU.
`--backend emulator --tiny` goes the same way on a CPU, to try the path: its times are not GPU speed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from bench.gpu_check.part import Settings
from bench.gpu_check.report import Outcome, Report, file_name, write_json
from minibert.backends import BackendUnavailable
from minibert.cli import UsageMistake
from minibert.cli.options import notes, refuse_unwritable
from minibert.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
BUDGET = 520.0  # seconds in all: under nine minutes with what the interpreter and the table take
GRACE = 5.0  # seconds between telling a part to stop and killing it
STDERR = 2  # a part's own words: standard output holds the result alone
LEAST = 5.0  # seconds that a part must have: less is spent on starting


class Part(NamedTuple):
    """One part: where its code is, whether it says right or wrong, and the most seconds it may take."""

    name: str
    title: str
    target: str  # module:function
    correctness: bool
    limit_s: float


PARTS = (
    Part("machine", "what is here", "bench.gpu_check.machine:machine", False, 20),
    Part("compile", "kernels compiled", "bench.gpu_check.machine:compile_all", False, 60),
    Part("conformance", "every op against its formula", "bench.gpu_check.correctness:conformance", True, 120),
    Part("sanitizer", "compute-sanitizer", "bench.gpu_check.correctness:sanitizer", True, 50),
    Part("tiny_training", "tiny training run against NumPy", "bench.gpu_check.correctness:tiny_training", True, 40),
    Part("peaks", "this device's peaks", "bench.gpu_check.peaks:peaks", False, 25),
    Part("kernels", "each kernel against its floor", "bench.gpu_check.kernels:kernels", False, 90),
    Part("parity", "parity with transformers", "bench.gpu_check.correctness:parity", True, 60),
    Part("steps", "training steps of BERT-base", "bench.gpu_check.steps:steps", False, 420),
)


def run_parts(parts: Sequence[Part], settings: Settings, report: Report) -> None:
    """Run one after the other; each outcome stands in the report, and on disk, before the next begins."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts, 1):
            left = report.budget_s - (time.monotonic() - began)
            limit = left if report.emulated else min(part.limit_s, left)  # parts' limits are those of a GPU
            outcome = Outcome(part.name, part.title, part.correctness, limit_s=round(max(0.0, limit), 1))
            report.parts.append(outcome)
            notes.print(f"{number}/{len(parts)} {part.title}", highlight=False)
            if left < LEAST:
                used = report.budget_s - left
                outcome.status = "skipped" if not part.correctness else "timeout"
                outcome.reason = f"no time left: {used:.0f} s of {report.budget_s:.0f} s are used"
            else:
                _run(part, outcome, settings, report, Path(folder))
            report.seconds = round(time.monotonic() - began, 1)
            report.finished = number == len(parts)
            if report.path is None:
                _name_file(report)
            report.save()
            why = f": {outcome.reason.splitlines()[0]:.300}" if outcome.reason else ""
            notes.print(f"    {outcome.status} in {outcome.seconds:.1f} s{why}", highlight=False, markup=False)


def _name_file(report: Report) -> None:
    """On a GPU the file bears its name, which the first part finds out."""
    report.device = report.figures("machine").get("device", report.device)
    if not report.emulated:
        report.path = RESULTS / file_name(report.device, report.date)


def _run(part: Part, outcome: Outcome, settings: Settings, report: Report, folder: Path) -> None:
    """In a child process, which is killed with all its own when its time is up; its figures are on disk."""
    out, so_far = folder / f"{part.name}.json", folder / "report.json"
    write_json(so_far, report.document())
    seconds = max(LEAST / 2, outcome.limit_s - GRACE)  # it sees less, and stops by itself
    command = [sys.executable, "-m", "bench.gpu_check.part", part.target, json.dumps(asdict(settings)), str(out)]
    command += [str(so_far), str(seconds)]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=STDERR, start_new_session=True)
    ended = ""
    try:
        child.wait(timeout=outcome.limit_s)
        if child.returncode:
            ended = f"its process ended with status {child.returncode}"
            if child.returncode < 0:
                ended = f"its process was ended by {signal.Signals(-child.returncode).name}"
    except subprocess.TimeoutExpired:
        ended = f"not done within {outcome.limit_s:.0f} s"
    except KeyboardInterrupt:
        ended = "interrupted"
        raise
    finally:
        _end(child)
        outcome.seconds = round(time.monotonic() - began, 2)
        _take(outcome, out, ended)


def _end(child: subprocess.Popen[bytes]) -> None:
    """The child and what it started: compilers of PyTorch, say, that would disturb the next part."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    child.wait()


def _take(outcome: Outcome, out: Path, ended: str) -> None:
    """What the child wrote; it knows best, unless it did not come to its end."""
    try:
        kept = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {"status": "running"}
    outcome.figures, outcome.skipped = kept.get("figures", {}), kept.get("skipped", [])
    outcome.status, outcome.reason = kept["status"], kept.get("reason", "")
    if outcome.status == "running":
        outcome.status = "timeout" if ended.startswith("not done") else "error"
        outcome.reason = ended or "its process ended without a word"


def demand_gpu() -> None:
    """Raise BackendUnavailable unless there is a GPU, without taking any of its memory."""
    from minibert.backends.cuda import cupy_driver

    try:
        cupy_driver.available()
    except BackendUnavailable as error:
        raise BackendUnavailable(f"backend 'cupy' cannot run here: {error}") from error


def commit() -> str:
    """Of the source, with a + where it was changed since; empty where git does not know."""
    try:
        said = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return ""
    return said[0].strip() + ("+" if said[1].strip() else "")


def gpu_check(
    backend: Annotated[str, typer.Option(help="cupy, or with --tiny emulator.")] = "cupy",
    tiny: Annotated[bool, typer.Option("--tiny", help="Small shapes: to try the path, not to measure.")] = False,
    only: Annotated[str, typer.Option(metavar="PART,PART", help=f"Of {', '.join(p.name for p in PARTS)}.")] = "",
    seconds: Annotated[float, typer.Option(min=LEAST, help="For all parts together.")] = BUDGET,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Default: bench/results/<device>-<date>.json; emulated: none.")
    ] = None,
) -> int:
    """Check and measure this GPU."""
    from bench.gpu_check.tables import show

    if backend not in ("cupy", "emulator") or (backend == "emulator" and not tiny):
        raise UserError(f"--backend: expected cupy, or emulator together with --tiny, got {backend!r}")
    chosen = chosen_parts(only)
    refuse_unwritable(json=json_file)
    if backend == "cupy":
        demand_gpu()
    report = Report(
        backend, "gpu" if backend == "cupy" else "emulator", datetime.now(UTC).isoformat(timespec="seconds"), commit(),
        " ".join(["python -m bench.gpu_check", *sys.argv[1:]]), seconds, backend == "emulator",
        path=None if json_file is None else json_file.resolve(),
    )  # fmt: skip
    try:
        run_parts(chosen, Settings(backend, tiny), report)
    finally:  # an interrupt too leaves what there is
        report.save()
        show(report)
    return 0 if report.document()["ok"] else 1


def chosen_parts(only: str) -> list[Part]:
    """The parts named, in their order, or all. Raises UserError for a name that is none."""
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in {part.name for part in PARTS}]:
        raise UserError(f"--only: no part is called {unknown[0]!r}: choose from {', '.join(p.name for p in PARTS)}")
    return [part for part in PARTS if not wanted or part.name in wanted]


def main() -> None:
    """A user's mistake, and the lack of a GPU, are one line on stderr and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(gpu_check)
    try:
        status = app(standalone_mode=False)
    except (UserError, BackendUnavailable) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except UsageMistake as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)
