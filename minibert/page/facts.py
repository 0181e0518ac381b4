"""What a comparison found, read for the page: every value may be missing, and none is trusted to be what it should."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

from minibert.lab.measure.quiet import Spread, ratio

STEP = ("forward", "backward", "optimiser")  # the stages of a training step
STAGES = ("preprocess", *STEP, "inference")
# A backend keeps its colour on every page; others take the places that are left.
COLOURS = {"numpy": 0, "numba": 1, "cupy": 2, "emulator": 3, "torch": 4, "onnxruntime": 5}
PLACES = 8  # colours in style.css
NOT_GPU_SPEED = "its times are not GPU speed"  # how the emulator describes itself


class Contestant(NamedTuple):
    """A backend on the page. One that plays another machine shows its errors and no time."""

    name: str
    what: str
    colour: int
    emulated: bool


class StageTime(NamedTuple):
    """One stage on one backend, in milliseconds per sample, and the peak memory above what stood before it."""

    stage: str
    backend: str
    ms: float | None
    each: list[float]  # milliseconds per sample of the timed steps, in their order
    us_per_token: float | None
    peak_bytes: float | None
    energy_j: float | None


class OpRow(NamedTuple):
    """One op on one backend. Times are of one step, None where the backend plays another machine."""

    op: str
    backend: str
    by: str
    ok: bool
    calls: float | None
    judged: float | None
    ms: float | None
    share: float | None  # of the step
    gflops: float | None
    gbps: float | None
    flops: float | None
    bytes: float | None
    predicted_ms: float | None
    limit: str
    limit_share: float | None
    note: str  # one of minibert.lab.measure.roofline's, "unexplained" where a share above 1 has none, or empty
    ulp_max: float | None
    err_over_us: float | None
    bound_share: float | None
    ulps: Mapping[str, float]

    @property
    def severity(self) -> float:
        """The share of the bound; infinite where a wrong result has none."""
        return self.bound_share if self.bound_share is not None else 0.0 if self.ok else math.inf


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping with names as keys, else an empty one."""
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def listed(value: Any) -> list[Any]:
    """A list, else an empty one."""
    return list(value) if isinstance(value, list | tuple) else []


def rows(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; what else is in it is left out."""
    return [mapping(row) for row in listed(value) if isinstance(row, Mapping)]


def numbers(value: Any) -> list[float]:
    """The finite numbers of a list."""
    return [x for x in map(number, listed(value)) if x is not None]


def colours(names: Iterable[str]) -> dict[str, int]:
    """A colour for each name: its own where it has one, else one that no other has, as long as there are any."""
    given = {name: COLOURS[name] for name in names if name in COLOURS}
    free = [place for place in range(PLACES) if place not in COLOURS.values()]
    for i, name in enumerate(dict.fromkeys(name for name in names if name not in given)):
        given[name] = free[i] if i < len(free) else i % PLACES
    return given


class Faster(NamedTuple):
    """A backend, and how many times as fast as another it is."""

    name: str
    times: Spread


def disturbance(document: Mapping[str, Any]) -> dict[str, Any]:
    """The load that a document of any of our commands was measured at, as `minibert.lab.measure.quiet` reads it."""
    given, machine = mapping(document.get("disturbance")), mapping(document.get("machine"))
    found = {name: number(given.get(name, machine.get(name))) for name in ("load", "others", "cores")}
    cores = found["cores"]
    return {**found, "cores": None if cores is None else round(cores), "why": list(map(str, listed(given.get("why"))))}


class Facts:
    """The document that `minibert compare --json` writes."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = mapping(document)
        self.config = mapping(self.document.get("config"))
        self.machine = mapping(self.document.get("machine"))

    @cached_property
    def backends(self) -> list[Contestant]:
        """In the order of the comparison; the first is the reference."""
        named = {str(row.get("name")): str(row.get("what", "")) for row in rows(self.document.get("backends"))}
        places = colours(list(named))
        played = set(map(str, listed(self.document.get("emulated"))))
        return [
            Contestant(name, what, places[name], name in played or NOT_GPU_SPEED in what)
            for name, what in named.items()
        ]

    @cached_property
    def names(self) -> set[str]:
        return {b.name for b in self.backends}

    @cached_property
    def timed(self) -> list[Contestant]:
        """Those whose times are their machine's."""
        measured = {row.backend for row in self.stages}
        return [b for b in self.backends if not b.emulated and b.name in measured]

    @property
    def timed_steps(self) -> int:
        return max((len(row.each) for row in self.stages), default=0)

    @cached_property
    def emulated(self) -> set[str]:
        return {b.name for b in self.backends if b.emulated}

    @property
    def ok(self) -> bool:
        return self.document.get("ok") is True

    @cached_property
    def stages(self) -> list[StageTime]:
        samples, found = number(self.config.get("sequences")), []
        for row in rows(self.document.get("stages")):
            if str(row.get("backend")) not in self.names - self.emulated:
                continue
            seconds = [s * 1e3 / samples for s in numbers(row.get("seconds"))] if samples else []
            per_token = number(row.get("ms_per_token"))
            found.append(
                StageTime(
                    str(row.get("stage")), str(row.get("backend")), number(row.get("ms_per_sample")),
                    seconds, None if per_token is None else per_token * 1e3,
                    number(row.get("peak_bytes")), number(row.get("energy_j")),
                )
            )  # fmt: skip
        return found

    def stage(self, name: str, backend: str) -> StageTime | None:
        return next((row for row in self.stages if (row.stage, row.backend) == (name, backend)), None)

    def step_ms(self, backend: str) -> float | None:
        """Milliseconds per sample of a training step: forward, backward and optimiser."""
        found = [row.ms for name in STEP if (row := self.stage(name, backend)) is not None and row.ms is not None]
        return sum(found) if len(found) == len(STEP) else None

    def ratio(self, faster: str, slower: str, stage: str = "") -> Spread | None:
        """How many times as fast one backend is as another, in a stage or, without its name, in a training step.

        None where the times of each step are not known: how far such a figure spreads is part of it.
        """
        ours, theirs = (self._each(name, stage) for name in (faster, slower))
        return ratio(theirs, ours) if len(ours) == len(theirs) else None

    def _each(self, backend: str, stage: str) -> list[float]:
        found = [row.each for name in ([stage] if stage else STEP) if (row := self.stage(name, backend)) is not None]
        whole = len(found) == (1 if stage else len(STEP)) and len({len(each) for each in found}) == 1
        return [sum(parts) for parts in zip(*found, strict=True)] if whole else []

    def fastest(self, stage: str = "") -> Faster | None:
        """Of the backends beside the first, the one that is fastest beside it."""
        reference, *others = [b.name for b in self.timed] or [""]
        found = [Faster(name, r) for name in others if (r := self.ratio(name, reference, stage)) is not None]
        return max(found, key=lambda one: one.times.median, default=None)

    @cached_property
    def ops(self) -> list[OpRow]:
        found = []
        for row in rows(self.document.get("ops")):
            backend = str(row.get("backend"))
            if backend not in self.names:
                continue
            spent = {} if backend in self.emulated else row
            share = number(spent.get("limit_share"))
            note = str(spent.get("note") or ("unexplained" if share is not None and share > 1 else ""))
            found.append(
                OpRow(
                    str(row.get("op")), backend, str(row.get("by", "")), row.get("ok") is True,
                    number(row.get("calls")), number(row.get("judged")),
                    number(spent.get("ms")), number(spent.get("share")), number(spent.get("gflops")),
                    number(spent.get("gbps")), number(row.get("flops")), number(row.get("bytes")),
                    number(spent.get("predicted_ms")), str(spent.get("limit") or ""), share, note,
                    number(row.get("ulp_max")), number(row.get("err_over_us")), number(row.get("bound_share")),
                    {k: x for k, v in mapping(row.get("ulps")).items() if (x := number(v)) is not None},
                )
            )  # fmt: skip
        return found

    @cached_property
    def losses(self) -> dict[str, list[float | None]]:
        given = mapping(self.document.get("loss"))
        return {b.name: list(map(number, values)) for b in self.backends if (values := listed(given.get(b.name)))}

    @cached_property
    def peaks(self) -> dict[str, Mapping[str, Any]]:
        """The ceilings of the backends for which they were measured."""
        given = mapping(self.document.get("peaks"))
        return {b.name: found for b in self.timed if (found := mapping(given.get(b.name)))}

    @cached_property
    def memory(self) -> dict[str, list[tuple[float, float, str, str]]]:
        """Of each backend: seconds since the step began, live bytes, stage, op."""
        given, found = mapping(self.document.get("memory")), {}
        for b in self.timed:
            points = [
                (seconds, live, str(stage), str(op))
                for at, held, stage, op in (p for p in listed(given.get(b.name)) if len(listed(p)) == 4)
                if (seconds := number(at)) is not None and (live := number(held)) is not None
            ]
            if points:
                found[b.name] = points
        return found

    @cached_property
    def disturbance(self) -> dict[str, Any]:
        return disturbance(self.document)

    @property
    def scaling(self) -> Mapping[str, Any]:
        return mapping(self.document.get("scaling"))

    def roof_share(self, backend: str) -> float | None:
        """The roofline's time of all ops over the measured time: how near a whole step is to its limit."""
        known = [r for r in self.ops if r.backend == backend and r.predicted_ms is not None and r.ms is not None]
        spent = sum(r.ms or 0.0 for r in known)
        return sum(min(r.predicted_ms or 0.0, r.ms or 0.0) for r in known) / spent if spent else None

    def largest_distance(self, measure: str) -> float | None:
        """Of "loss" or "weights": the largest relative distance of a backend from the reference."""
        given = mapping(self.document.get("distance"))
        found = [number(mapping(given.get(b.name)).get(measure)) for b in self.backends[1:]]
        return max((x for x in found if x is not None), default=None)
