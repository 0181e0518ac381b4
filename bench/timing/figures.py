"""Every figure in the document of a bench in one form, and as a long CSV in Liger-Kernel's columns.

`bench.ops`, `bench.step`, `bench.infer` and `bench.scaling` write one JSON document each. `figures(document)` reads any
of them; `bench.compare` and `--csv` use nothing else. Impossible figures and refused measures are left out.

The columns have the names and the order of benchmark/data/all_benchmark_data.csv in linkedin/Liger-Kernel, so that a
script that plots theirs plots ours. What stands in them differs in four:

kernel_provider              a backend, or a library that it was compared with
kernel_operation_mode        "forward", "backward" or "full"; NAME_grad is NAME, backward
gpu_name                     the processor, where the figure was measured on one
liger_version                minibert's version
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import UserError

COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "liger_version",
)  # fmt: skip
MODES = {"step": "full", "infer": "forward"}
KINDS = ("ops", "step", "infer", "scaling")


class Figure(NamedTuple):
    """One measured value: its median and its 20th and 80th percentiles, in `unit`."""

    kernel: str  # op, or measure
    provider: str
    mode: str
    metric: str  # "speed" or "memory"
    unit: str  # "ms" or "MB"
    x_name: str
    x_label: str
    x_value: float
    median: float
    p20: float
    p80: float


def kind(document: Any) -> str:
    """Which bench wrote this document. Raises UserError for one that none wrote."""
    if isinstance(document, Mapping):
        if "scaling" in document:
            return "scaling"
        if document.get("bench") in KINDS:
            return str(document["bench"])
    raise UserError(f"expected what {', '.join(f'bench.{k} --json' for k in KINDS)} writes, got something else")


def settings(document: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for: figures of different settings are not those of the same thing."""
    if kind(document) != "scaling":
        return {**document["settings"], "threads": document["threads"]}
    scaling = document["scaling"]
    sizes = {f"sizes of {name}": axis["sizes"] for name, axis in scaling["axes"].items()}
    return {"what": scaling["what"], "work": scaling["work"], **scaling["model"], **scaling["base"], **sizes}


def figures(document: Mapping[str, Any]) -> list[Figure]:
    """All of them, in the document's order."""
    which = kind(document)
    if which == "ops":
        return list(_of_ops(document))
    return list(_of_scaling(document["scaling"]) if which == "scaling" else _of_measures(document))


def _of_ops(document: Mapping[str, Any]) -> Iterator[Figure]:
    x = "T", "sequence length", float(document["settings"]["length"])
    for row in document["ops"]:
        if row["note"] == "impossible" or not row["ok"]:
            continue
        name = row["op"].removesuffix("_grad")
        which = name, row["backend"], "forward" if name == row["op"] else "backward"
        yield Figure(*which, "speed", "ms", *x, *_spread(row["seconds"], 1e3))
        if row["peak_bytes"]:  # a view takes none
            yield Figure(*which, "memory", "MB", *x, *[row["peak_bytes"] * 1e-6] * 3)


def _of_measures(document: Mapping[str, Any]) -> Iterator[Figure]:
    x = "T", "sequence length", float(document["settings"]["length"])
    which = kind(document)
    for measure, facts in document["measures"].items():
        if facts["refused"]:
            continue
        for who, taken in facts["seconds"].items():
            name = f"{which}_{measure}", who, MODES[which]
            if who not in facts["impossible"]:
                yield Figure(*name, "speed", "ms", *x, *_spread(taken, 1e3))
            if facts["peak_bytes"].get(who) is not None:
                yield Figure(*name, "memory", "MB", *x, *[facts["peak_bytes"][who] * 1e-6] * 3)


def _of_scaling(scaling: Mapping[str, Any]) -> Iterator[Figure]:
    mode = "forward" if scaling["work"] == "inference" else "full"
    for name, axis in scaling["axes"].items():
        for backend, found in axis["backends"].items():
            rows = zip(axis["sizes"], found["seconds"], found["p20"], found["p80"], strict=True)
            for size, median, p20, p80 in rows:
                if median is not None and size not in (found.get("impossible") or ()):
                    x = name, f"{name} ({axis['unit']})" if axis.get("unit") else name, float(size)
                    spread = _spread({"median": median, "p20": p20, "p80": p80}, 1e3)
                    yield Figure(f"scaling_{name}", backend, mode, "speed", "ms", *x, *spread)


def _spread(taken: Mapping[str, Any], factor: float) -> tuple[float, float, float]:
    return taken["median"] * factor, taken["p20"] * factor, taken["p80"] * factor


# ------------------------------------------------------------------------------------------------------------ long CSV


def refuse_other_csv(path: Path | None) -> None:
    """Raise UserError for a file that is there and holds something else: before the work, not after it."""
    if path is None or not path.is_file() or not path.stat().st_size:
        return
    try:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
    except (UnicodeDecodeError, csv.Error):
        header = []
    if tuple(header) != COLUMNS:
        raise UserError(f"--csv: {path} has other columns than these benches write; name a new file")


def add_to_csv(path: Path | None, document: Mapping[str, Any]) -> None:
    """Add the document's figures to a long CSV, begun if it is not there: runs at several sizes make a plot."""
    if path is None:
        return
    refuse_other_csv(path)
    begun = path.is_file() and path.stat().st_size > 0
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not begun:
            writer.writerow(COLUMNS)
        writer.writerows(rows(document))


def rows(document: Mapping[str, Any]) -> list[list[Any]]:
    """One list for each figure, in the order of `COLUMNS`."""
    extra = json.dumps(settings(document), sort_keys=True)
    when = document["date"].replace("T", " ").removesuffix("Z")
    about = [extra, document["machine"]["processor"], when, document["versions"]["minibert"]]
    return [
        [f.kernel, f.provider, f.mode, f.metric, f.unit, f.x_name, f.x_label, f"{f.x_value:g}",
         *(f"{y:.9g}" for y in (f.median, f.p20, f.p80)), *about]
        for f in figures(document)
    ]  # fmt: skip
