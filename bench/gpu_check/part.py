"""One part of `bench.gpu_check`, in a process of its own: `python -m bench.gpu_check.part MODULE:FUNCTION ...`.

A kernel that hangs, or leaves the GPU's context broken, takes this process with it and nothing else. Figures are on
disk as soon as the part keeps them.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from bench.gpu_check.report import write_json

TRACE = 1500  # characters of a traceback that are kept
QUIET = 5.0  # seconds between two lines of progress where there is no terminal


class Failed(Exception):
    """A demand is not met; the message says which."""


class Skipped(Exception):
    """The part cannot run here; the message says why, and what would mend it."""


@dataclass(frozen=True)
class Settings:
    """What is run."""

    backend: str = "cupy"
    tiny: bool = False  # small shapes: the path is tried, nothing is measured


@dataclass
class Run:
    """What a part is given: settings, what earlier parts found, a clock, and where figures go."""

    settings: Settings
    out: Path
    seconds: float  # that the part has
    report: dict[str, Any]  # the document so far
    figures: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    status: str = "running"
    reason: str = ""

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self._said = 0.0

    @property
    def backend(self) -> Any:
        """Where it runs. Raises BackendUnavailable."""
        from minibert import backends

        return backends.get(self.settings.backend)

    @property
    def emulated(self) -> bool:
        return self.settings.backend == "emulator"

    def left(self) -> float:
        """Seconds until this part must have ended."""
        return self.seconds - (time.monotonic() - self.began)

    def keep(self, **figures: Any) -> None:
        """Note figures, and write all there are."""
        self.figures.update(figures)
        self.write()

    def skip(self, what: str) -> None:
        """Note what is left out, and why."""
        self.skipped.append(what)
        self.say(f"skipped: {what}", always=True)
        self.write()

    def write(self) -> None:
        kept = {name: getattr(self, name) for name in ("status", "reason", "figures", "skipped")}
        write_json(self.out, {**kept, "settings": asdict(self.settings)})

    def earlier(self, name: str) -> dict[str, Any]:
        """The figures of an earlier part."""
        return next((p["figures"] for p in self.report.get("parts", []) if p["name"] == name), {})

    def say(self, text: str, always: bool = False) -> None:
        """Progress, on stderr: a line that is overwritten, or now and then one where there is no terminal."""
        now = time.monotonic()
        if sys.stderr.isatty():
            print(f"\r\x1b[2K    {text}", end="\n" if always else "", file=sys.stderr, flush=True)
        elif always or now - self._said > QUIET:
            self._said = now
            print(f"    {text}", file=sys.stderr, flush=True)

    @contextmanager
    def at_speed(self) -> Iterator[Any]:
        """The backend without its checks: what is timed is the kernels alone."""
        backend = self.backend
        with backend.emulator.set(sanitize=False) if self.emulated else contextlib.nullcontext():
            yield backend


def run_part(target: str, run: Run) -> None:
    """Call the part, and write what became of it."""
    module, _, function = target.partition(":")
    try:
        run.write()
        getattr(import_module(module), function)(run)
        run.status = "ok"
    except Failed as error:
        run.status, run.reason = "failed", str(error)
    except Skipped as error:
        run.status, run.reason = "skipped", str(error)
    except Exception as error:
        run.status, run.reason = "error", f"{type(error).__name__}: {error}"
        run.figures["traceback"] = traceback.format_exc()[-TRACE:]
    finally:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
        run.write()


def main() -> None:
    target, settings, out, report, seconds = sys.argv[1:]
    document = json.loads(Path(report).read_text(encoding="utf-8"))
    run_part(target, Run(Settings(**json.loads(settings)), Path(out), float(seconds), document))


if __name__ == "__main__":
    from bench.gpu_check import part  # the module that parts import: its exceptions are not those of __main__

    part.main()
