"""A comparison as plain data: what `minibert compare --json` writes and its report page reads.

Whatever is not finite, or was not measured, is None; of energy and cost it says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from minibert import __version__
from minibert.lab.compare.records import Comparison, OpRecord, Run, rate
from minibert.lab.lockstep.assess import LEAST_BUCKET, MOST_BUCKET
from minibert.lab.measure.prices import Prices
from minibert.lab.measure.quiet import Spread
from minibert.lab.measure.roofline import IMPOSSIBLE, floor, note

LIBRARIES = ("numpy", "scipy", "numba", "cupy-cuda12x", "cupy-cuda13x")
BUCKETS = ("0", *(f"2^{k}" for k in range(LEAST_BUCKET, MOST_BUCKET + 1)), "not finite")
NO_METER = "energy was not metered"
BROKE_DOWN = "training broke down, so nothing was timed"
PLAYED = "this backend plays another machine: its time is not that machine's"


def facts(
    found: Comparison, config: Mapping[str, Any], machine: Mapping[str, Any],
    prices: Prices | None = None, scaling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The comparison as plain data. What is called `ms` are medians over the timed steps, in milliseconds.

    `predicted_ms` is the least that the op takes under the machine's peaks, and `limit` which of them sets it;
    `limit_share` is that over the median, and `note` says what it is above 1 (`lab.measure.roofline.NOTES`): of an
    impossible one nothing is derived. `ratio`, of ops and stages and in `speed` of whole steps, is how many times as
    fast as the reference they are: median, p20 and p80 of the steps, which took turns; `disturbance` is the load, and
    why the machine was not quiet (`lab.measure.quiet`). `prices` and `scaling` (the document of
    `minibert.lab.measure.scaling.measure`) are put in as they are asked for.
    """
    timed = found.runs if found.timed else []
    apart = {
        run.backend.name: {"loss": found.loss_distance(run), "weights": found.weight_distance(run)} for run in timed
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "versions": versions(),
        "config": dict(config),
        "backends": [{"name": run.backend.name, "what": run.backend.describe()} for run in found.runs],
        "emulated": [run.backend.name for run in found.runs if run.backend.emulated],
        "ops": [_op(found, run, record) for run in found.runs for record in run.ops.values()],
        "stages": [row for run in timed for row in _stages(found, run)],
        "speed": {run.backend.name: _ratio(found.speed(run)) for run in timed[1:]},
        "disturbance": dict(found.disturbance),
        "loss": {run.backend.name: [_finite(loss) for loss in run.losses] for run in found.runs},
        "distance": {name: {k: _finite(v) for k, v in both.items()} for name, both in apart.items()},
        "peaks": {run.backend.name: _peaks(found, run) for run in found.runs},
        "memory": {run.backend.name: [list(moment) for moment in run.memory] for run in timed if run.memory},
        "energy": _energy(found),
        "cost": {run.backend.name: _cost(found, run, prices) for run in found.runs},
        "scaling": None if scaling is None else dict(scaling),
        "ok": found.ok,
    }


def versions() -> dict[str, str]:
    """Of minibert, and of the libraries that are installed."""
    known = {"minibert": __version__}
    for library in LIBRARIES:
        try:
            known[library] = version(library)
        except PackageNotFoundError:
            continue
    return known


def _op(found: Comparison, run: Run, record: OpRecord) -> dict[str, Any]:
    timed, seconds, limit = found.timed, record.median_seconds, _limit(found, run, record)
    rated = timed and limit["note"] != IMPOSSIBLE
    return {
        "op": record.op.name,
        "backend": run.backend.name,
        "by": run.backend.by(record.op),
        "calls": record.calls,
        "judged": len(record.judgements),
        "flops": record.cost.flops,
        "bytes": record.cost.bytes,
        "ms": seconds * 1e3 if timed else None,
        "seconds": list(record.seconds) if timed else [],
        "share": seconds / run.step_seconds if timed else None,
        "ratio": _ratio(found.speed(run, record.op)),
        "gflops": rate(record.cost.flops, seconds) if rated else None,
        "gbps": rate(record.cost.bytes, seconds) if rated else None,
        **limit,
        **{name: _finite(record.worst(name)) for name in ("ulp_max", "err_over_us", "bound_share")},
        "ulps": {bucket: record.ulps[bucket] for bucket in BUCKETS if record.ulps[bucket]},
        "ok": not record.failures,
    }


def _limit(found: Comparison, run: Run, record: OpRecord) -> dict[str, Any]:
    """The roofline's time of the op in one step."""
    if found.extras is None or found.extras.peaks is None or run.launch_seconds is None or not run.on_cpu:
        return {"predicted_ms": None, "limit": None, "limit_share": None, "note": ""}
    peaks, launch, seconds = found.extras.peaks, run.launch_seconds, record.median_seconds
    least = floor(record.cost, peaks, launch, record.calls)
    known = found.timed and seconds > 0
    said = note(record.works, seconds, peaks, launch) if known else ""
    share = least.seconds / seconds if known and said != IMPOSSIBLE else None
    return {"predicted_ms": least.seconds * 1e3, "limit": least.limit, "limit_share": share, "note": said}


def _peaks(found: Comparison, run: Run) -> dict[str, Any] | None:
    if found.extras is None or found.extras.peaks is None or not run.on_cpu:
        return None
    return {**found.extras.peaks._asdict(), "launch_s": run.launch_seconds}


def _stages(found: Comparison, run: Run) -> list[dict[str, Any]]:
    return [
        {
            "stage": name,
            "backend": run.backend.name,
            "ms_per_sample": stage.seconds * 1e3 / found.samples,
            "ms_per_token": stage.seconds * 1e3 / len(found.batch.input_ids),
            "seconds": list(run.times[name]),
            "ratio": _ratio(found.speed(run, name)),
            "peak_bytes": stage.peak_bytes,
            "energy_j": _joules(run, name),
        }
        for name, stage in run.stages.items()
    ]


def _joules(run: Run, part: str) -> float | None:
    """Mean over the timed steps, of a stage or of the "step"; None where a counter did not move in one of them."""
    each = run.joules.get(part, [])
    known = [x for x in each if x is not None]
    return float(np.mean(known)) if known and len(known) == len(each) else None


def _energy(found: Comparison) -> dict[str, Any]:
    meter = found.extras.meter if found.extras else None
    steps = {run.backend.name: _joules(run, "step") if found.timed else None for run in found.runs}
    reasons = {run.backend.name: _unmetered(found, run) for run in found.runs if steps[run.backend.name] is None}
    distinct = list(dict.fromkeys(reasons.values()))
    alike = len(distinct) == 1 and len(reasons) == len(found.runs)
    why = distinct[0] if alike else "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    source = meter.source(any(not run.on_cpu for run in found.runs)) if meter else ""
    return {"source": source or None, "why": why, "joules_per_step": steps}


def _unmetered(found: Comparison, run: Run) -> str:
    """Why the joules of this backend's step are not known."""
    if run.backend.emulated:
        return PLAYED
    meter = found.extras.meter if found.extras else None
    if meter is None:
        return NO_METER
    coarse = f"{meter.source(not run.on_cpu)} did not move in every step: its steps are coarser than that"
    return meter.why(run.on_cpu) or (coarse if found.timed else BROKE_DOWN)


def _cost(found: Comparison, run: Run, prices: Prices | None) -> dict[str, Any]:
    """Of a million tokens trained on, and of a million inferred from."""
    if prices is None:
        return {"unavailable": "no --prices FILE"}
    if run.backend.emulated or not found.timed:
        return {"unavailable": PLAYED if run.backend.emulated else BROKE_DOWN}
    name, tokens, unmetered = run.backend.name, len(found.batch.input_ids), _unmetered(found, run)
    step = prices.cost(name, run.step_seconds, _joules(run, "step"), tokens, unmetered)
    inference = prices.cost(name, run.stages["inference"].seconds, _joules(run, "inference"), tokens, unmetered)
    if isinstance(step, str):
        return {"unavailable": step}
    return {
        "per_million_tokens": step.per_million_tokens,
        "inference_per_million_tokens": None if isinstance(inference, str) else inference.per_million_tokens,
        "currency": prices.currency,
        "basis": step.basis,
        "inference_basis": inference if isinstance(inference, str) else inference.basis,
    }


def _ratio(found: Spread | None) -> dict[str, float] | None:
    return None if found is None else found._asdict()


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None
