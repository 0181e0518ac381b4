"""What `minibert diff --steps` shows: its first line, a table of steps, a table of ops, and the same as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from minibert.cli.diff_report import facts, finite, verdict
from minibert.cli.options import folded, plain_table
from minibert.lab.lockstep.drift import Drift, OpDrift

STEPS_SHOWN = 11  # first and last, and between them at equal distances


def drift_verdict(found: Drift, steps: int) -> str:
    """One line: the culprit and its step, or that every call of every step stayed within its bound."""
    if found.found is not None:
        return f"step {len(found.steps) + 1} of {steps}: {verdict(found.found)}"
    last = found.steps[-1]
    local = max(op.shares["local"] for op in found.ops.values())
    return (
        f"[green]no culprit[/green] in {steps} steps: {found.calls} calls within their bounds on both sides; local "
        f"error at most {local:.2%} of a bound; weights {last.weights_apart:.1g} apart in the end, "
        f"losses {_loss_apart(found):.1g} at most"
    )


def _loss_apart(found: Drift) -> float:
    return max(abs(s.loss_b - s.loss_a) / abs(s.loss_a) for s in found.steps)


DRIFT_MEANINGS = {
    "losses apart": "relative, as weights apart", "local of bound": "each op's own error, of what is allowed",
    "calls": "in the run",
    "in its run": "the same on a side's own inputs", "inherited first": "how far apart inputs are in the first step",
    "last": "in the last", "growth": "of that distance to the outputs, the median",
}  # fmt: skip


def drift_tables(found: Drift, ulp: bool) -> Iterator[Table]:
    """Steps, then ops; `ulp`: with errors in units in the last place."""
    if found.steps:
        steps = plain_table(title="Steps, each side on its own results", header_style="bold")
        for name in ("step", "loss A", "loss B", "losses apart", "weights apart", "of bound"):
            steps.add_column(name, justify="right", no_wrap=True)
        for at in sorted({round(x) for x in np.linspace(0, len(found.steps) - 1, STEPS_SHOWN)}):
            s = found.steps[at]
            apart = abs(s.loss_b - s.loss_a) / abs(s.loss_a)
            steps.add_row(
                str(s.step), f"{s.loss_a:.6f}", f"{s.loss_b:.6f}", f"{apart:.1e}", f"{s.weights_apart:.1e}",
                f"{s.bound_share:.2%}",
            )  # fmt: skip
        yield steps
    ops = plain_table(title="Ops: local error is each op's own, inherited is what came in", header_style="bold")
    names = ["op", "phase", "calls", "local of bound", "in its run", *(["max ulp"] if ulp else []), "err/uS"]
    for name in (*names, "inherited first", "last", "growth", "worst at"):
        left = name in ("op", "phase", "worst at")
        fold = folded(name == "worst at")
        ops.add_column(name, justify="left" if left else "right", no_wrap=name == "op", overflow=fold)
    for op in found.ops.values():
        ops.add_row(*_row(op, ulp))
    yield ops


def _row(op: OpDrift, ulp: bool) -> list[str]:
    ulps = [f"{op.ulp_max:.3g}"] if ulp else []
    step, place = op.worst
    return [
        op.op, op.phase, str(op.calls), f"{op.shares['local']:.2%}", f"{max(op.shares['a'], op.shares['b']):.2%}",
        *ulps, f"{op.err_over_us:.3g}", f"{op.inherited[0]:.1e}", f"{op.inherited[-1]:.1e}",
        f"{median(op.growth):.2g}" if op.growth else "", f"step {step} {place}",
    ]  # fmt: skip


def drift_facts(found: Drift) -> dict[str, Any]:
    """Every step and every op as plain data; of the step in which a call left its bound what `diff --json` writes."""
    return {
        "ok": found.ok,
        "steps": [_plain(asdict(step)) for step in found.steps],
        "ops": [
            _plain({**asdict(op), "worst": {"step": op.worst[0], "place": op.worst[1]}}) for op in found.ops.values()
        ],
        "found": found.found and {"step": len(found.steps) + 1, **facts(found.found)},
    }


def _plain(value: Any) -> Any:
    """What is not finite is None."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return finite(value) if isinstance(value, float) else value
