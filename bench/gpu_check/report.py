"""What `bench.gpu_check` leaves behind: one JSON document, rewritten after each part; see results/README.md."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = 1  # raised when a name changes its meaning
EMULATED = "emulated: not GPU speed"
STATUSES = ("ok", "failed", "error", "timeout", "skipped", "running")


@dataclass
class Outcome:
    """What became of one part."""

    name: str
    title: str
    correctness: bool  # the exit status depends on it
    status: str = "running"  # one of STATUSES
    reason: str = ""  # empty if ok
    seconds: float = 0.0
    limit_s: float = 0.0
    skipped: list[str] = field(default_factory=list)  # what the part left out, and why
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """The whole document. `save` writes it, if a path is known."""

    backend: str
    device: str
    date: str  # ISO 8601, UTC
    commit: str  # of the source, "" where git does not say; "+" after it: with changes
    command: str
    budget_s: float
    emulated: bool
    schema: int = SCHEMA
    label: str = ""  # EMULATED, or empty
    ok: bool = False  # the run came to its end, and `passed`
    seconds: float = 0.0
    parts: list[Outcome] = field(default_factory=list)
    path: Path | None = None
    finished: bool = False  # every part has had its turn

    def __post_init__(self) -> None:
        self.label = EMULATED if self.emulated else ""

    def document(self) -> dict[str, Any]:
        """What the file holds; `machine` is what the first part found out."""
        found = asdict(self)
        del found["path"], found["finished"]
        found["ok"] = self.ok = self.finished and passed(self.parts)
        found["machine"] = self.figures("machine")
        return found

    def figures(self, name: str) -> dict[str, Any]:
        """The figures of a part; none if it did not run."""
        return next((part.figures for part in self.parts if part.name == name), {})

    def save(self) -> None:
        if self.path is not None:
            write_json(self.path, self.document())


def passed(parts: list[Outcome]) -> bool:
    """Whether nothing is wrong: every correctness part passed or says why it could not run, and no demand failed.

    A correctness part that raised or ran out of time has not passed.
    """
    wrong = any(part.correctness and part.status not in ("ok", "skipped") for part in parts)
    return bool(parts) and not wrong and not any(part.status == "failed" for part in parts)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace the file whole: whoever reads it, or stops the run, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(plain(document), file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def plain(value: Any) -> Any:
    """What JSON holds: numbers of NumPy as Python's, null for what is no finite number."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def file_name(device: str, date: str) -> str:
    """`<device>-<date>.json`, as in nvidia-h200-2026-11-22.json."""
    return f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}-{date[:10]}.json"


def problems(document: Any, where: str = "the document") -> Iterator[str]:
    """In what a document is not of this schema: names that are missing, unknown, or of another type."""
    expected = {
        "schema": int, "label": str, "emulated": bool, "ok": bool, "backend": str, "device": str, "date": str,
        "commit": str, "command": str, "seconds": (int, float), "budget_s": (int, float), "machine": dict,
        "parts": list,
    }  # fmt: skip
    yield from _typed(document, expected, where)
    for part in document.get("parts", []) if isinstance(document, dict) else []:
        name = f"part {part.get('name')!r}" if isinstance(part, dict) else "a part"
        expected = {
            "name": str, "title": str, "correctness": bool, "status": str, "reason": str, "seconds": (int, float),
            "limit_s": (int, float), "skipped": list, "figures": dict,
        }  # fmt: skip
        yield from _typed(part, expected, name)
        if isinstance(part, dict) and part.get("status") not in STATUSES:
            yield f"{name}: status {part.get('status')!r} is none of {', '.join(STATUSES)}"
        if isinstance(part, dict) and part.get("status") in STATUSES[1:-1] and not part.get("reason"):
            yield f"{name}: {part.get('status')} without a reason"


def _typed(value: Any, expected: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: expected an object, got {type(value).__name__}"
        return
    for name, kind in expected.items():
        if name not in value:
            yield f"{where}: no {name!r}"
        elif not isinstance(value[name], kind):
            yield f"{where}: {name!r} is {type(value[name]).__name__}"
    yield from (f"{where}: {name!r} is not of the schema" for name in value if name not in expected)
