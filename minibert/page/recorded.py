"""Results of other runs, perhaps of other machines, read from their files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import UserError
from minibert.lab.lockstep.trace import load
from minibert.page.facts import mapping, rows

KINDS = {
    "compare": "minibert compare",
    "bench.ops": "bench.ops: each op by itself",
    "bench.step": "bench.step: a training step",
    "bench.infer": "bench.infer: inference",
    "bench.scaling": "bench.scaling: time against size",
    "gpu-check": "make gpu-check",
    "trace": "trace of minibert diff --record",
}


class Recorded(NamedTuple):
    """A document of another run."""

    name: str  # of the file
    kind: str  # one of KINDS
    facts: Mapping[str, Any]


def read_recorded(path: Path) -> Recorded:
    """Read what `minibert compare --json`, a bench, `make gpu-check` or `minibert diff --record` wrote.

    Raises UserError, one line, for anything else.
    """
    if not path.is_file():
        raise UserError(f"--with {path}: there is no such file; name a JSON document or a trace that minibert wrote")
    if path.suffix == ".safetensors":
        return Recorded(path.name, "trace", _of_trace(path))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"--with {path}: expected JSON or a trace (.safetensors), got what cannot be read: {error}"
        ) from error
    kind = kind_of(document)
    if kind is None:
        known = ", ".join(KINDS.values())
        raise UserError(f"--with {path}: expected a document of one of {known}; got another")
    return Recorded(path.name, kind, document)


def _of_trace(path: Path) -> dict[str, Any]:
    recording = load(path)
    return {
        "name": recording.name, "what": recording.what, "dtype": recording.dtype, "products": recording.products,
        "loss": recording.loss, "facts": dict(recording.facts),
        "calls": [{"op": call.op, "phase": call.phase} for call in recording.calls],
    }  # fmt: skip


def kind_of(document: Any) -> str | None:
    """Which command wrote a document, by the names in it; None: none of ours."""
    if not isinstance(document, dict):
        return None
    if isinstance(document.get("parts"), list) and "schema" in document:
        return "gpu-check"
    if all(name in document for name in ("stages", "ops", "loss", "backends")):
        return "compare"
    if "axes" in mapping(document.get("scaling")):
        return "bench.scaling"
    if f"bench.{document.get('bench')}" in KINDS:
        return f"bench.{document['bench']}"
    measures = mapping(document.get("measures"))
    if measures:
        return "bench.infer" if "logits" in mapping(document.get("settings")) else "bench.step"
    return "bench.ops" if rows(document.get("ops")) and "peaks" in document else None
