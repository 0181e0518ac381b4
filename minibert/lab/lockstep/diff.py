"""One training step on two sides, call by call: where they part, who is wrong, and what is only inherited.

Side A runs first and is recorded (`lab.lockstep.trace`); side B runs the same step from the same weights and batch, and
each of its calls is set beside A's as it comes. Of a call there are up to three results, each judged against the
formula in float64 on the very inputs that it was computed from (`minibert.lab.conform.judge`):

- A's, in its own step;
- B's, in its own step;
- B's on A's inputs: its *local* error, free of all that B did before.

The culprit is the first call of which any leaves its bound. What two sides inside their bounds still stand apart is
*inherited*: the distance of B's output from A's, the distance of their inputs, and the growth from one to the other,
which is the conditioning of the op at that place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from minibert.data.batching import PackedBatch
from minibert.errors import UserError
from minibert.kernels.op import Op, outputs
from minibert.lab.conform.judge import Judgement
from minibert.lab.lockstep.assess import Assessment, Distance, assess, distance, known
from minibert.lab.lockstep.trace import (
    Call,
    MakeModel,
    Recording,
    Seen,
    Side,
    Training,
    copied,
    described,
    key_of,
    raised,
    record_step,
    same_bits,
)


@dataclass(frozen=True)
class Row:
    """One call. What could not be judged, or not be compared, is None."""

    call: int  # from 1
    op: str
    phase: str
    place: str
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    a: Assessment | None
    b: Assessment | None  # in B's own step
    local: Assessment | None  # B on A's inputs
    inputs: Distance | None
    outputs: Distance | None

    @property
    def side(self) -> str:
        """Who left its bound: "A", "B", "both", or "" for neither."""
        a = self.a is not None and self.a.wrong
        b = any(x is not None and x.wrong for x in (self.local, self.b))
        return "both" if a and b else "A" if a else "B" if b else ""

    @property
    def growth(self) -> float | None:
        """Relative distance of the outputs over that of the inputs."""
        if self.inputs is None or self.outputs is None or self.inputs.relative == 0:
            return None
        return self.outputs.relative / self.inputs.relative

    @property
    def judged(self) -> list[Assessment]:
        return [x for x in (self.a, self.b, self.local) if x is not None]

    @property
    def worst(self) -> Assessment | None:
        """B's where B is wrong, else the one that used up most of its bound."""
        wrong = [x for x in (self.local, self.b, self.a) if x is not None and x.wrong]
        return wrong[0] if wrong else max(self.judged, key=lambda x: x.judgement.bound_share, default=None)

    @property
    def unbounded(self) -> int:
        """Elements of which the bound says nothing."""
        return max((x.judgement.unbounded for x in self.judged), default=0)


class Evidence(NamedTuple):
    """The call of the culprit: what it was given, and who made something wrong of it."""

    op: Op
    params: Mapping[str, Any]
    inputs: Sequence[np.ndarray]  # as they were before the call
    on: str  # "A" or "B"
    calls: int = 1  # the same call, one after the other, that kernels take to go wrong from when they are loaded


@dataclass
class Difference:
    """What `diff` found. `parted` says where the two sides stopped running the same calls; else it is empty."""

    a: Side | Recording
    b: Side | Recording
    rows: list[Row] = field(default_factory=list)
    losses: tuple[float | None, float | None] = (None, None)
    parted: str = ""
    broken: str = ""  # what ended the step early, on either side
    evidence: Evidence | None = None

    @property
    def culprit(self) -> Row | None:
        return next((row for row in self.rows if row.side), None)

    @property
    def unjudged(self) -> int:
        """Calls with a result that could not be judged, because what it was computed from is not in the trace."""
        live = isinstance(self.b, Side)
        return sum(row.a is None or row.b is None or (live and row.local is None) for row in self.rows)

    @property
    def ok(self) -> bool:
        return self.culprit is None and not self.parted


class _Parted(Exception):
    """The two sides run different calls from here on."""


def diff(
    a: Side | Recording,
    b: Side | Recording,
    make_model: MakeModel,
    batch: PackedBatch,
    step: int = 1,
    learning_rate: float = 1e-4,
    progress: Callable[[str], None] = lambda text: None,
) -> Difference:
    """Compare the `step`-th training step of a model on one batch, call by call, on two sides.

    One of them may be a trace. `make_model(backend, dtype)` gives both the same weights. A is kept meanwhile: each
    array once, what exceeds a gigabyte in a temporary file. Most memory goes to the bounds: with 1000 tokens the whole
    process took 0.7 GB for the configuration tiny, 1.4 GB for mini, 3.2 GB for small. Raises UserError for two traces,
    and where a step breaks down although no call left its bound.
    """
    if isinstance(a, Recording) and isinstance(b, Recording):
        raise UserError("diff: two traces hold no inputs to run an op on; give a backend as one side")
    if isinstance(a, Side):
        progress(f"side A, {a.name}: the step")
    before_a, before_b = (
        x if isinstance(x, Recording) else Training(x, make_model, lambda number: batch, learning_rate) for x in (a, b)
    )
    for _ in range(step - 1):
        for training in (before_a, before_b):
            if isinstance(training, Training):
                training.step()
    return diff_step(before_a, before_b, progress)


def diff_step(
    a: Training | Recording, b: Training | Recording, progress: Callable[[str], None] = lambda text: None,
    local: bool = True,
) -> Difference:  # fmt: skip
    """Compare the next step of A and of B, call by call. Raises UserError as `diff` does.

    Without `local` nothing but its own step is asked of B, so that its kernels are called as often as in a run.
    """
    found = Difference(_side_of(a), _side_of(b))
    recorded = record_step(a) if isinstance(a, Training) else a
    lockstep = _Lockstep(recorded, found, progress, local)
    loss: float | None = None
    try:
        if isinstance(b, Recording):
            loss = b.loss
            for number, call in enumerate(b.calls):
                lockstep.look(b.seen(number, {}), call)
        else:
            loss = b.step(lockstep.look)
        lockstep.end()
    except _Parted as parted:
        found.parted = str(parted)
    except MemoryError:
        raise
    except Exception as error:  # whatever a wrong kernel leads to
        if not found.rows or (found.ok and not isinstance(error, FloatingPointError)):
            raise
        found.broken = f"side B: {raised(error)}"
    if recorded.error and not found.broken:
        found.broken = f"side A: {recorded.error}"
    found.losses = recorded.loss, loss
    if found.broken and found.ok:
        raise UserError(f"{found.broken}, although no call left its bound: are the weights finite?")
    return found


def _side_of(run: Training | Recording) -> Side | Recording:
    return run.side if isinstance(run, Training) else run


class _Lockstep:
    """Sees each call of B, and sets it beside A's."""

    def __init__(self, a: Recording, found: Difference, progress: Callable[[str], None], local: bool) -> None:
        self.a, self.found, self.progress = a, found, progress
        self.side = found.b if local and isinstance(found.b, Side) else None
        self.products = found.b.products

    def look(self, b: Seen, recorded: Call | None = None) -> None:
        """Compare the next call of B; `recorded` is where it was read, if B is a trace."""
        number = len(self.found.rows)
        self.progress(f"call {number + 1} of {len(self.a.calls)}: {b.op.name}")
        if number >= len(self.a.calls):
            raise _Parted(f"call {number + 1}: side B calls {_where(b.op.name, b.place)}, side A has ended")
        call, text = self.a.calls[number], recorded.params if recorded else described(b.params)
        theirs = (call.op, call.phase, call.place, call.params, tuple(k.shape for k in call.inputs))
        mine = (b.op.name, b.phase, b.place, text, _shapes(b))
        if mine != theirs:
            raise _Parted(f"call {number + 1}: side A calls {_call_of(*theirs)}, side B {_call_of(*mine)}")
        params = self.a.params[number] if recorded else b.params
        a, b = self.a.seen(number, params), b._replace(params=params)
        a, b = _completed(a, b), _completed(b, a)
        row = self._row(number + 1, a, b)
        self.found.rows.append(row)
        if row.side and self.found.evidence is None:
            self.found.evidence = _evidence(row, a, b)

    def end(self) -> None:
        number = len(self.found.rows)
        if number < len(self.a.calls):
            call = self.a.calls[number]
            raise _Parted(f"call {number + 1}: side A calls {_where(call.op, call.place)}, side B has ended")

    def _row(self, number: int, a: Seen, b: Seen) -> Row:
        questions: dict[str, _Question | Assessment] = {}
        for name, seen, products in (("a", a, self.a.products), ("b", b, self.products)):
            if seen.problem:
                questions[name] = _problem(seen.problem)
            elif known(seen.inputs):
                questions[name] = _Question(seen.inputs, seen.outputs, products)
        if self.side is not None and known(a.inputs):
            questions["local"] = self._local(self.side, a, b)
        answers = _answered(a.op, a.params, questions)
        return Row(
            number, a.op.name, a.phase, a.place, _shapes(b),
            answers.get("a"), answers.get("b"), answers.get("local"),
            distance(a.inputs, b.inputs), distance(a.outputs, b.outputs),
        )  # fmt: skip

    def _local(self, side: Side, a: Seen, b: Seen) -> _Question | Assessment:
        """B on A's inputs, in B's dtypes."""
        backend = side.backend
        given = [np.asarray(x).astype(np.asarray(y).dtype) for x, y in zip(a.inputs, b.inputs, strict=True)]
        with backend.unwatched():
            try:
                result = backend.run(a.op, *(backend.asarray(x.copy()) for x in given), **a.params)
                return _Question(given, [copied(backend, r) for r in outputs(result)], side.products)
            except Exception as error:  # whatever a kernel does is part of the verdict
                return _problem(raised(error))


def _evidence(row: Row, a: Seen, b: Seen) -> Evidence | None:
    """B's fault before A's, on A's inputs before its own; None where those are not in a trace."""
    local = row.local is not None and row.local.wrong
    seen = a if local or row.side == "A" else b
    if not known(seen.inputs) or not known((b if local else seen).inputs):
        return None
    # in the dtypes of the side that is wrong, as it was given them
    pairs = zip(seen.inputs, (b if local else seen).inputs, strict=True)
    given = [np.array(x, np.asarray(y).dtype) for x, y in pairs]
    return Evidence(a.op, a.params, given, "A" if row.side == "A" else "B")


def _call_of(op: str, phase: str, place: str, params: str, shapes: tuple[tuple[int, ...], ...]) -> str:
    return f"{_where(op, place)} ({', '.join(part for part in (phase, params) if part)}) on {shapes}"


def _where(op: str, place: str) -> str:
    return f"{op} in {place}" if place else op


def _shapes(seen: Seen) -> tuple[tuple[int, ...], ...]:
    if seen.keys is not None:
        return tuple(key.shape for key in seen.keys)
    return tuple(x.shape for x in seen.inputs if x is not None)


def _completed(seen: Seen, other: Seen) -> Seen:
    """With those inputs that are not in a trace, but whose hash says that the other side has the same."""
    if seen.keys is None:
        return seen
    keys, pairs = seen.keys, zip(seen.inputs, other.inputs, strict=True)
    found = [
        theirs if mine is None and theirs is not None and key_of(theirs) == keys[i] else mine
        for i, (mine, theirs) in enumerate(pairs)
    ]
    return seen._replace(inputs=found)


class _Question(NamedTuple):
    """Is this what the op gives on these inputs?"""

    inputs: Sequence[Any]
    got: Sequence[np.ndarray]
    products: str


def _problem(what: str) -> Assessment:
    return Assessment(Judgement(np.inf, np.inf, np.inf, False, None, what, 0))


def _answered(
    op: Op, params: Mapping[str, Any], questions: Mapping[str, _Question | Assessment]
) -> dict[str, Assessment]:
    """Judge each result; the formula is evaluated once for all that had the same inputs."""
    answers = {name: q for name, q in questions.items() if isinstance(q, Assessment)}
    open_questions = {name: q for name, q in questions.items() if isinstance(q, _Question)}
    while open_questions:
        first = next(iter(open_questions.values()))
        alike = {
            name: q
            for name, q in open_questions.items()
            if q.products == first.products and all(map(same_bits, q.inputs, first.inputs))
        }
        judged = assess(op, first.inputs, params, [q.got for q in alike.values()], first.products)
        answers |= dict(zip(alike, judged, strict=True))
        open_questions = {name: q for name, q in open_questions.items() if name not in alike}
    return answers
