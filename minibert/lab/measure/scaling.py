"""How the cost of a training step, or of inference, grows with batch, length, width and threads, on every backend.

One axis is varied while the others keep their base sizes. What is timed is a whole step of a small BERT with its masked
language model: forward with dropout, backward, clipping and AdamW, from a batch in host arrays to the loss on the host,
all that was launched being done; so copies and launches are in it. Each round takes every size, and at each size
every backend in turn (A B A B), so that a machine that slows down slows all of them; warm-up and compiling are apart.

What is read off the times - exponents and crossovers - is defined in `minibert.lab.measure.growth`.

Every op that a kernel or a library runs is held to the bound of its formula once at each size, before it is timed.

A point whose rate of arithmetic is above the peak of the machine, measured before and after, is impossible: it is
listed, and nothing is made of it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from minibert import backends
from minibert.backends import MOST_THREADS, Backend, BackendUnavailable
from minibert.errors import UserError
from minibert.kernels.op import Array, Op, outputs
from minibert.kernels.readings import cost
from minibert.lab.lockstep.assess import assess
from minibert.lab.measure.growth import crossovers, growth
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE
from minibert.model.tensor import no_grad
from minibert.train.optim import AdamW, parameter_groups

WORK = {
    "step": "a training step: forward with dropout, backward, clipping and AdamW",
    "inference": "inference: the last hidden state",
}
UNITS = {"batch": "sequences", "length": "tokens", "hidden": "channels", "threads": "threads"}
PLACES = {"batch": "a batch of {}", "length": "a length of {}", "hidden": "a width of {}", "threads": "{} threads"}
AXES = {"batch": (1, 2, 4, 8, 16), "length": (16, 32, 64, 128, 256), "hidden": (64, 128, 256, 512)}
QUICK_AXES = {"batch": (1, 4, 16), "length": (16, 64, 256), "hidden": (64, 128, 256)}

LAYERS, VOCABULARY, HEAD_SIZE, POSITIONS = 2, 8000, 64, 512
PREDICTED = 0.15  # share of the tokens, as BERT was trained
LEARNING_RATE = 1e-6  # the update costs the same, and after hundreds of them the backends' losses can still be compared
SAME = 1e-4  # of the largest: results further apart are not those of the same work
SHORTEST = 0.02  # seconds that a turn lasts at the least: a quick step is repeated in it
SETTLE = 0.02  # seconds between turns: idle threads of the one before may spin for some milliseconds
FEWEST_ROUNDS = 3
MOST = 1 << 20  # a larger size is a slip of the keyboard


def thread_counts(most: int) -> tuple[int, ...]:
    """Powers of two below `most`, and `most`: an axis of threads, where there is more than one."""
    return (*(1 << i for i in range((most - 1).bit_length())), most)


@dataclass(frozen=True)
class Base:
    """The sizes that an axis does not vary."""

    batch: int = 4
    length: int = 64
    hidden: int = 256
    threads: int = 1


def measure(
    places: Sequence[Backend],
    axes: Mapping[str, Sequence[int]],
    base: Base,
    rounds: int = 7,
    progress: Callable[[str], None] = lambda text: None,
    work: str = "step",
) -> dict[str, Any]:
    """Time `work` ("step" or "inference") along each axis of `axes` (name -> sizes that grow) on every backend.

    The document: `axes` -> axis -> `backends` -> name -> `seconds` (median of each size; None where impossible), `p20`,
    `p80`, `all` (size by round), and what `lab.measure.growth` reads off them; and `crossovers`. Where backends do not
    give the same results, `refused` says so and no figure is given; one whose threads cannot be set is in `left_out`
    of that axis. Raises UserError for sizes that cannot be measured and for a backend that plays another machine.
    """
    _check(places, axes, base, rounds, work)
    limits = {threads: 0.0 for threads in sorted({base.threads, *axes.get("threads", ())})}
    found = {}
    judged: set[Any] = set()
    with _threads_kept(places):
        _raise_limits(limits, progress)
        for axis, sizes in axes.items():
            found[axis] = _axis(axis, sizes, places, base, rounds, work, limits, judged, progress)
            gc.collect()  # the models of one axis are not to stand in the way of the next
    model = {"layers": LAYERS, "vocabulary": VOCABULARY, "head_size": HEAD_SIZE, "predicted": PREDICTED}
    return {
        "what": WORK[work], "work": work, "base": asdict(base), "model": model, "rounds": rounds,
        "limit_gflops": {str(threads): limit or None for threads, limit in limits.items()}, "axes": found,
    }  # fmt: skip


def _check(places: Sequence[Backend], axes: Mapping[str, Sequence[int]], base: Base, rounds: int, work: str) -> None:
    played = [place.name for place in places if place.emulated]
    if played:
        raise UserError(f"{', '.join(played)} plays another machine, and its times are no machine's: leave it out")
    if work not in WORK:
        raise UserError(f"work: expected {' or '.join(WORK)}, got {work!r}")
    if rounds < FEWEST_ROUNDS:
        raise UserError(f"rounds: expected {FEWEST_ROUNDS} or more, got {rounds}")
    if not axes:
        raise UserError(f"axes: expected some of {', '.join(UNITS)}, got none")
    for axis, sizes in axes.items():
        if axis not in UNITS:
            raise UserError(f"axes: expected some of {', '.join(UNITS)}, got {axis!r}")
        if len(sizes) < 2 or any(a >= b for a, b in pairwise(sizes)):
            raise UserError(f"{axis}: expected two or more sizes, each larger than the one before, got {list(sizes)}")
    for axis in UNITS:
        for size in (getattr(base, axis), *axes.get(axis, ())):
            if axis == "hidden" and (size < 1 or size % HEAD_SIZE):
                raise UserError(f"hidden: expected multiples of {HEAD_SIZE}, the width of a head, got {size}")
            most = MOST_THREADS if axis == "threads" else MOST
            if not 1 <= size <= most:
                raise UserError(f"{axis}: expected 1 to {most}, got {size}")


# --------------------------------------------------------------------------------------------------------- the timing


@dataclass
class Point:
    """One size on one backend."""

    backend: Backend
    size: int
    threads: int
    call: Callable[[], np.ndarray]  # makes one step; its result on the host
    unseen: Callable[[], np.ndarray]  # the same on another batch, to be compared after the timing
    flops: int = 0  # of a step
    repeats: int = 1  # steps in a turn
    first_s: float = 0.0  # the first call, which may compile
    result: Any = None
    seconds: list[float] = field(default_factory=list)  # of one step, in each round


class Side:
    """The model, and what trains it, on one backend."""

    def __init__(self, backend: Backend, hidden: int, positions: int) -> None:
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=LAYERS, max_position_embeddings=positions,
            num_attention_heads=hidden // HEAD_SIZE, intermediate_size=4 * hidden,
        )  # fmt: skip
        self.backend = backend
        self.model = BertForMaskedLM(config, backend, "float32")
        self.optimizer = AdamW(parameter_groups(self.model, 0.01), lr=LEARNING_RATE, max_grad_norm=1.0)

    def step(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        loss = self.model.train()(**inputs, return_dict=True).loss
        loss.backward()
        value = loss.item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.backend.synchronize()
        return np.asarray(value)

    def inference(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        given = {name: array for name, array in inputs.items() if name != "labels"}
        with no_grad():
            return np.array(self.model.eval().bert(**given, return_dict=True).last_hidden_state.numpy())


def random_batch(batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """B sequences of T tokens, packed: ids and labels (N,), of which a share is predicted; cu_seqlens (B + 1,)."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY, batch * length)
    chosen = rng.permutation(ids.size)[: max(1, round(PREDICTED * ids.size))]
    labels = np.full(ids.size, IGNORE)
    labels[chosen] = rng.integers(1, VOCABULARY, len(chosen))
    return {"input_ids": ids, "cu_seqlens": np.arange(batch + 1) * length, "labels": labels}


def _points(
    axis: str, sizes: Sequence[int], places: Sequence[Backend], base: Base, work: str, progress: Callable[[str], None]
) -> list[Point]:
    """Size by size, the backends of each one after the other; sizes of one width share a model."""
    sides: dict[tuple[str, int], Side] = {}
    points = []
    positions = max(POSITIONS, base.length, *(sizes if axis == "length" else ()))
    for size in sizes:
        at = replace(base, **{axis: size})
        seen, unseen = (random_batch(at.batch, at.length, seed) for seed in (0, 1))
        for place in places:
            progress(f"{axis}: making the model of width {at.hidden} on {place.name}")
            key = (place.name, at.hidden)
            sides[key] = sides.get(key) or Side(place, at.hidden, positions)
            run = getattr(sides[key], work)
            points.append(Point(place, size, at.threads, partial(run, seen), partial(run, unseen)))
    return points


def _time(axis: str, points: list[Point], rounds: int, judged: set[Any], progress: Callable[[str], None]) -> str:
    """Warm up, judge and time all points in turn. Says what is wrong, or why the sides do not do the same work."""
    by_size = {p.size: [q for q in points if q.size == p.size] for p in points}
    for size, turn in by_size.items():
        progress(f"{axis} {size}: warm-up")
        _warm_up(turn)
        if why := _apart(turn):
            return f"{axis} {size}: {why}"
        progress(f"{axis} {size}: judging every op")
        for point in turn:
            if why := _wrong(point, judged):
                return f"{axis} {size}: {why}"
    enabled = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            for size, turn in by_size.items():
                progress(f"{axis} {size}: round {number + 1} of {rounds}")
                for point in turn:
                    _take_turn(point, settle=axis == "threads")
            gc.collect()
    finally:
        if enabled:
            gc.enable()
    for size, turn in by_size.items():
        for point in turn:
            point.result = point.unseen()
        if why := _apart(turn):
            return f"{axis} {size}, after the timing: {why}"
    return ""


def _warm_up(turn: list[Point]) -> None:
    """Compile, count the work, and find how many steps make a turn: as many for all, so that all train alike."""
    quickest = math.inf
    for point in turn:
        point.backend.set_num_threads(point.threads)
        began = time.perf_counter()
        point.result = point.call()
        point.first_s = time.perf_counter() - began
        began = time.perf_counter()
        point.call()
        quickest = min(quickest, time.perf_counter() - began)
    flops = count_flops(turn[0].backend, turn[0].call)
    for point in turn[1:]:
        point.call()  # as the one whose work was counted
    for point in turn:
        point.flops, point.repeats = flops, max(1, math.ceil(SHORTEST / quickest))


def _wrong(point: Point, judged: set[Any]) -> str:
    """What a kernel or library gives wrong in a step; empty where all lies under its bound.

    `judged` has the calls that were held to it before: of one op on one backend and so many threads, of such shapes.
    """
    place, found = point.backend, ""

    def look(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        nonlocal found
        which = (place.name, point.threads, op, *((a.shape, str(a.dtype)) for a in arrays))
        if found or which in judged or place.by(op) == "formula":
            return call()
        judged.add(which)
        given = [np.array(place.numpy(a)) for a in arrays]
        result = call()
        got = [np.array(place.numpy(r)) for r in outputs(result)]
        judgement = assess(op, given, params, [got], place.product_mode)[0].judgement
        if not judgement.ok:
            found = f"{op.name} on {place.name} is wrong: {judgement.problem or judgement.worst}"
        return result

    with place.watched_by(look):
        point.call()
    return found


def _take_turn(point: Point, settle: bool) -> None:
    if point.backend.num_threads() != point.threads:
        point.backend.set_num_threads(point.threads)
    if settle:  # threads that have just been made
        point.call()
    time.sleep(SETTLE)
    began = time.perf_counter()
    for _ in range(point.repeats):
        point.call()
    point.seconds.append((time.perf_counter() - began) / point.repeats)


def count_flops(backend: Backend, call: Callable[[], Any]) -> int:
    """Flops of all ops of one call, counted in the door, from shapes alone."""
    flops = 0

    def count(op: Op, arrays: tuple[Array, ...], params: Mapping[str, Any], call: Callable[[], Any]) -> Any:
        nonlocal flops
        flops += cost(op, *map(backend.numpy, arrays), **params).flops
        return call()

    with backend.watched_by(count):
        call()
    return flops


def _apart(turn: Sequence[Point]) -> str:
    """Why the results of the backends are not those of the same work; empty where they are."""
    reference = turn[0].result
    for point in turn[1:]:
        distance = float(np.abs(point.result - reference).max() / np.abs(reference).max())
        if not distance <= SAME:
            return f"{point.backend.name} is {distance:.1e} away from {turn[0].backend.name}: not the same work"
    return ""


@contextmanager
def _threads_kept(places: Sequence[Backend]) -> Iterator[None]:
    before = [place.num_threads() for place in places]
    try:
        yield
    finally:
        for place, count in zip(places, before, strict=True):
            place.set_num_threads(count)


def _takes_threads(place: Backend, count: int) -> bool:
    place.set_num_threads(count)
    return place.num_threads() == count


def _raise_limits(limits: dict[int, float], progress: Callable[[str], None]) -> None:
    """The CPU's peak on so many threads, GFLOP/s: the best measured so far, since others' work can only lower it.

    It is measured by kernels of Numba; without that it stays 0, which means that it is not known.
    """
    try:
        numba = backends.get("numba")
    except BackendUnavailable:
        return
    from minibert.lab.measure.peaks import fma_gflops, product_gflops

    with _threads_kept([numba]):
        for threads in limits:
            progress(f"the peak on {threads} thread{'s'[: threads > 1]}")
            numba.set_num_threads(threads)
            limits[threads] = max(limits[threads], fma_gflops(), product_gflops("float32", 1024, 1024, 1024)[0])


# ------------------------------------------------------------------------------------------------- what is made of it


def _axis(
    axis: str, sizes: Sequence[int], places: Sequence[Backend], base: Base, rounds: int, work: str,
    limits: dict[int, float], judged: set[Any], progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Time one axis, and read it."""
    able = [p for p in places if axis != "threads" or all(_takes_threads(p, count) for count in sizes)]
    left_out = {p.name: "its threads cannot be set" for p in places if p not in able}
    points = _points(axis, sizes, able, base, work, progress)
    refused = _time(axis, points, rounds, judged, progress)
    _raise_limits(limits, progress)
    facts: dict[str, Any] = {"sizes": list(sizes), "unit": UNITS[axis], "refused": refused, "left_out": left_out}
    if refused:
        return {**facts, "backends": {}, "crossovers": []}
    curves = {p.name: read_curve(axis, [q for q in points if q.backend is p], limits) for p in able}
    pairs = combinations(curves, 2)
    named = {name: (name, c["seconds"], c["p20"], c["p80"]) for name, c in curves.items()}
    met = [one for a, b in pairs for one in crossovers(sizes, named[a], named[b], PLACES[axis])]
    return {**facts, "backends": curves, "crossovers": met}


def read_curve(axis: str, points: Sequence[Point], limits: Mapping[int, float]) -> dict[str, Any]:
    """The figures of one backend along an axis, a value for each size; None where its time is impossible."""
    every = np.array([point.seconds for point in points])  # (S, R)
    low, middle, high = np.percentile(every, [20, 50, 80], axis=1)
    rates = np.array([point.flops for point in points]) / middle * 1e-9
    shares = [r / known if (known := _limit(p, limits)) else None for r, p in zip(rates.tolist(), points, strict=True)]
    possible = np.array([share is None or share <= 1 for share in shares])
    sizes = np.array([point.size for point in points])
    facts = {
        "seconds": _where(possible, middle), "p20": _where(possible, low), "p80": _where(possible, high),
        "all": _where(possible, every), "flops": [point.flops for point in points],
        "share_of_peak": [share if ok else None for share, ok in zip(shares, possible, strict=True)],
        "first_call_s": [point.first_s for point in points], "impossible": sizes[~possible].tolist(),
        **growth(sizes[possible], every[possible].T, linear=axis == "batch"),
    }  # fmt: skip
    if axis == "threads":
        speedup = middle[0] / middle if possible[0] else np.full(len(sizes), np.nan)
        facts["speedup"] = _where(possible & possible[0], speedup)
        facts["efficiency"] = _where(possible & possible[0], speedup * sizes[0] / sizes)
    return facts


def _where(possible: np.ndarray, values: np.ndarray) -> list[Any]:
    return [value if ok else None for value, ok in zip(values.tolist(), possible, strict=True)]


def _limit(point: Point, limits: Mapping[int, float]) -> float:
    """GFLOP/s; 0 where it is not known: only the CPU's is measured."""
    on_cpu = isinstance(point.backend.asarray(np.zeros(1, np.float32)), np.ndarray)
    return limits[point.threads] if on_cpu else 0.0
