"""`bench.scaling`: exponents and crossovers of times that are known, the order of the turns, and what is refused."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bench import scaling as command
from bench.timing import harness
from bench.timing.batches import forward_flops
from bench.timing.sides import say_quiet
from minibert import backends
from minibert.backends import Backend
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.lab.measure import quiet, scaling
from minibert.lab.measure.growth import crossovers, growth
from minibert.lab.measure.scaling import UNITS, Base, Point, Side, measure
from minibert.model.config import BertConfig

SIZES = (1, 2, 4, 8, 16)
TINY = Base(batch=1, length=4, hidden=64, threads=1)


@pytest.fixture
def places() -> Iterator[list[Backend]]:
    found = [backends.get("numpy"), backends.get("numba")]
    before = [place.num_threads() for place in found]
    yield found
    for place, count in zip(found, before, strict=True):
        place.set_num_threads(count)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model, no pauses, and a peak that takes no time to measure."""
    for name, value in (("LAYERS", 1), ("VOCABULARY", 64), ("POSITIONS", 16), ("SHORTEST", 0.0), ("SETTLE", 0.0)):
        monkeypatch.setattr(scaling, name, value)
    peak_is(monkeypatch, 1e9)


def peak_is(monkeypatch: pytest.MonkeyPatch, gflops: float) -> None:
    monkeypatch.setattr(scaling, "_raise_limits", lambda limits, progress: limits.update(dict.fromkeys(limits, gflops)))


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command as the shell runs it; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bench.scaling", *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(command.bench)
    return int(exit_.value.code or 0)


def nothing() -> np.ndarray:
    return np.ones(1)


# ---------------------------------------------------------------------------------------------------------- exponents


def noisy(law: Callable[[np.ndarray], np.ndarray], noise: float, rounds: int = 41) -> np.ndarray:
    """(R, S): the law's times, each off by a factor of its own."""
    rng = np.random.default_rng(5)
    return law(np.array(SIZES, float)) * np.exp(rng.normal(0, noise, (rounds, len(SIZES))))


@pytest.mark.parametrize("power", [-1.0, 0.5, 1.0, 2.0])
def test_a_known_exponent_is_found_in_noise_and_its_range_holds_it(power: float) -> None:
    found = growth(SIZES, noisy(lambda n: 0.003 * n**power, 0.05))
    low, high = found["exponent_range"]
    assert found["exponent"] == pytest.approx(power, abs=0.02) and low < power < high
    assert 0.01 < high - low < 0.06, "of one round: 0.84 times 0.05 / sqrt(sum of squares of log size), twice"
    low, high = found["last_exponent_range"]
    assert found["last_exponent"] == pytest.approx(power, abs=0.05) and low < power < high
    assert high - low > 0.08, "two sizes tell less than five"
    assert found["misfit"] < 0.03 and found["fixed_seconds"] is None


def test_without_noise_the_exponent_is_exact() -> None:
    found = growth(SIZES, noisy(lambda n: n**1.7, 0.0))
    assert found["exponent_range"] == pytest.approx([1.7, 1.7]) and found["last_exponent"] == pytest.approx(1.7)
    assert found["misfit"] == pytest.approx(0, abs=1e-9)


def test_a_cost_that_stays_is_told_from_the_growth() -> None:
    found = growth(SIZES, noisy(lambda n: 0.020 + 0.005 * n, 0.01), linear=True)
    assert found["fixed_seconds"] == pytest.approx(0.020, rel=0.03)
    assert found["exponent"] < found["last_exponent"] < 1, "it tends to 1"
    assert found["last_exponent"] == pytest.approx(np.log2(100 / 60), abs=0.02)
    assert found["misfit"] > 0.1, "this is no power"
    assert growth(SIZES, noisy(lambda n: n**1.2, 0.0), linear=True)["fixed_seconds"] == 0.0


def test_a_disturbed_round_widens_nothing_but_itself() -> None:
    seconds = noisy(lambda n: n, 0.01, rounds=9)
    seconds[4, -1] *= 50
    found = growth(SIZES, seconds)
    assert found["exponent"] == pytest.approx(1, abs=0.02) and found["exponent_range"][1] < 1.02


def test_one_size_has_no_exponent() -> None:
    assert set(growth([4], np.ones((3, 1))).values()) == {None}


# --------------------------------------------------------------------------------------------------------- crossovers


def side(name: str, times: Sequence[float | None], noise: float = 0.01) -> Any:
    low, high = ([None if t is None else t * f for t in times] for f in (1 - noise, 1 + noise))
    return name, times, low, high


def met(a: Any, b: Any, sizes: tuple[int, ...] = SIZES) -> list[dict[str, Any]]:
    return crossovers(sizes, a, b, "a batch of {}")


def test_a_crossover_of_two_powers_is_where_they_meet() -> None:
    a, b = side("A", [float(n) for n in SIZES]), side("B", [3 * n**0.4 for n in SIZES])
    (one,) = met(a, b)
    assert one["size"] == pytest.approx(3 ** (1 / 0.6)) and one["between"] == [4, 8]
    assert (one["faster"], one["slower"]) == ("B", "A")
    assert one["said"] == "B overtakes A at a batch of 6.24, between 4 and 8"
    (same,) = met(b, a)
    assert same["said"] == one["said"], "whoever is named first"


def test_without_a_crossover_one_is_faster_everywhere() -> None:
    (one,) = met(side("A", [1, 2, 3, 4, 5]), side("B", [2, 4, 6, 8, 10]))
    assert one["size"] is None and (one["faster"], one["slower"]) == ("A", "B")
    assert one["said"] == "A is faster than B at every size measured"


def test_no_crossover_is_claimed_within_the_noise() -> None:
    a, b = [1, 2, 3, 4, 5.0], [1.02, 2.02, 3, 3.98, 4.98]
    assert met(side("A", a, 0.001), side("B", b, 0.001))[0]["size"] is not None
    (one,) = met(side("A", a, 0.02), side("B", b, 0.02))
    assert one["size"] is None and one["faster"] is None
    assert one["said"] == "A and B cannot be told apart at any size measured"


def test_times_whose_ranges_meet_are_not_told_apart() -> None:
    a, b = ("A", [1.0, 1.0], [0.9, 0.9], [1.1, 1.1]), ("B", [1.2, 1.2], [1.05, 1.05], [1.3, 1.3])
    for first, second in ((a, b), (b, a)):
        assert met(first, second, (1, 2))[0]["faster"] is None, "medians apart, p20-p80 not"


def test_sizes_within_the_noise_are_not_claimed_or_lie_within_the_crossover() -> None:
    (one,) = met(side("A", [1, 2, 3, 4, 5]), side("B", [1.001, 1.999, 6, 8, 10]))
    assert one["said"] == "A is faster than B at 4, 8, 16; elsewhere the two cannot be told apart"
    (one,) = met(side("A", [1, 2, 3, 4, 5]), side("B", [2, 2.01, 2.99, 3, 3]))
    assert one["between"] == [1, 8] and 2 < one["size"] < 4


def test_two_crossovers_and_sizes_without_a_time() -> None:
    first, second = met(side("A", [1, 2, 3, 4, 5]), side("B", [2, 1, 1, 8, 10]))
    assert [first["faster"], second["faster"]] == ["B", "A"]
    assert first["between"] == [1, 2] and second["between"] == [4, 8]
    (one,) = met(side("A", [1, 2, None, 4, 5]), side("B", [2, 4, 1, None, 1]))
    assert one["between"] == [2, 16], "what is impossible is passed over"
    (one,) = met(side("A", [1, None]), side("B", [None, 1]), (1, 2))
    assert one["faster"] is None and "no size" in one["said"]


# --------------------------------------------------------------------------------------------------------- the timing


def test_every_round_takes_every_size_and_backends_in_turn(quick: None) -> None:
    calls: list[str] = []

    def point(name: str, size: int) -> Point:
        def call() -> np.ndarray:
            calls.append(f"{name}{size}")
            return np.ones(1)

        return Point(Backend(name, numpy_module), size, 1, call, nothing)

    points = [point(name, size) for size in (1, 2) for name in "ab"]
    assert scaling._time("batch", points, 3, set(), lambda text: None) == ""
    assert calls[-12:] == ["a1", "b1", "a2", "b2"] * 3
    assert all(len(p.seconds) == 3 for p in points), "the warm-up is apart"
    assert len({calls.count(f"{name}{size}") for name in "ab" for size in (1, 2)}) == 1, "all train alike"


def test_a_quick_step_is_repeated_and_as_often_on_every_backend(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def taking(seconds: float) -> Callable[[], np.ndarray]:
        def call() -> np.ndarray:
            now[0] += seconds
            return np.ones(1)

        return call

    monkeypatch.setattr(scaling, "SHORTEST", 0.02)
    monkeypatch.setattr(scaling, "time", SimpleNamespace(perf_counter=lambda: now[0], sleep=lambda seconds: None))
    points = [Point(Backend("a", numpy_module), 1, 1, taking(step), nothing) for step in (0.008, 0.003)]
    assert scaling._time("batch", points, 3, set(), lambda text: None) == ""
    assert [p.repeats for p in points] == [7, 7], "a turn of the quicker lasts long enough"
    assert points[0].seconds == pytest.approx([0.008] * 3), "seconds are of one step"
    assert points[1].seconds == pytest.approx([0.003] * 3) and points[1].first_s == pytest.approx(0.003)


@pytest.mark.parametrize("work", ["step", "inference"])
def test_a_tiny_run_gives_the_whole_document(quick: None, places: list[Backend], work: str) -> None:
    before = [place.num_threads() for place in places]
    axes = {"batch": (1, 2, 3), "length": (2, 20), "hidden": (64, 128), "threads": (1, 2)}
    found = json.loads(json.dumps(measure(places, axes, TINY, 3, work=work), allow_nan=False))
    assert found["base"] == {"batch": 1, "length": 4, "hidden": 64, "threads": 1} and found["work"] == work
    assert [place.num_threads() for place in places] == before, "threads are left as they were"
    for axis, sizes in axes.items():
        facts = found["axes"][axis]
        assert facts["sizes"] == list(sizes) and facts["unit"] == UNITS[axis]
        assert facts["refused"] == "" and facts["left_out"] == {}
        assert list(facts["backends"]) == ["numpy", "numba"] and len(facts["crossovers"]) >= 1
        for curve in facts["backends"].values():
            for low, middle, high, every in zip(*(curve[k] for k in ("p20", "seconds", "p80", "all")), strict=True):
                assert 0 < low <= middle <= high and middle == np.median(every) and len(every) == 3
            assert curve["exponent_range"][0] <= curve["exponent"] <= curve["exponent_range"][1]
            assert curve["impossible"] == [] and (curve["fixed_seconds"] is not None) == (axis == "batch")
            grows = [b > a for a, b in zip(curve["flops"], curve["flops"][1:], strict=False)]
            assert not any(grows) if axis == "threads" else all(grows)
    threads = found["axes"]["threads"]["backends"]["numba"]
    one, two = threads["seconds"]
    assert threads["speedup"] == pytest.approx([1, one / two])
    assert threads["efficiency"] == pytest.approx([1, one / two / 2])
    assert threads["exponent"] == pytest.approx(threads["last_exponent"]), "of two sizes"


def test_flops_are_those_of_the_model_and_a_step_has_three_times_the_products(quick: None) -> None:
    place = backends.get("numpy")
    one, batch = Side(place, 128, 16), scaling.random_batch(3, 16)
    config = BertConfig(
        vocab_size=64, hidden_size=128, num_hidden_layers=1, num_attention_heads=2, intermediate_size=512
    )
    products = forward_flops(config, np.full(3, 16), 0)
    assert products < scaling.count_flops(place, lambda: one.inference(batch)) < 1.2 * products
    products = 3 * forward_flops(config, np.full(3, 16), round(0.15 * 48))
    updated = 40 * sum(p.data.size for p in one.model.parameters())  # at the most, by AdamW and the norm
    assert products < scaling.count_flops(place, lambda: one.step(batch)) < 1.2 * products + updated


def test_a_step_trains(quick: None) -> None:
    one, batch = Side(backends.get("numpy"), 64, 16), scaling.random_batch(2, 8)
    before = {name: p.data.copy() for name, p in one.model.named_parameters()}
    losses = [float(one.step(batch)) for _ in range(2)]
    assert losses[0] != losses[1], "dropout has other masks, and the weights have moved"
    assert all((p.data != before[name]).any() for name, p in one.model.named_parameters() if "bias" not in name)


# --------------------------------------------------------------------------------------------------- what is not shown


def test_what_is_above_the_peak_is_impossible_and_gives_no_figure(
    quick: None, monkeypatch: pytest.MonkeyPatch, places: list[Backend], capsys: pytest.CaptureFixture[str]
) -> None:
    peak_is(monkeypatch, 1e-9)
    monkeypatch.setattr(command, "console", Console(width=80))
    found = measure(places, {"batch": (1, 2), "threads": (1, 2)}, TINY, 3)
    for facts in found["axes"].values():
        for curve in facts["backends"].values():
            assert curve["impossible"] == [1, 2] and curve["exponent"] is None
            for key in ("seconds", "p20", "p80", "all", "share_of_peak"):
                assert curve[key] == [None, None]
        assert facts["crossovers"][0]["faster"] is None
    json.dumps(found, allow_nan=False)
    command.show(found)
    shown = capsys.readouterr().out
    assert shown.count("impossible") == 8 and "faster" not in shown


def test_points_above_the_peak_are_left_out_of_the_fit() -> None:
    def point(size: int, seconds: float, flops: int) -> Point:
        return Point(Backend("a", numpy_module), size, 1, nothing, nothing, flops, seconds=[seconds] * 3)

    points = [point(1, 1.0, 10**9), point(2, 1e-9, 10**9), point(4, 4.0, 10**9), point(8, 8.0, 10**9)]
    curve = scaling.read_curve("threads", points, {1: 2.0})
    assert curve["impossible"] == [2] and curve["seconds"] == [1.0, None, 4.0, 8.0]
    assert curve["exponent"] == pytest.approx(1) and curve["share_of_peak"] == [0.5, None, 0.125, 0.0625]
    assert curve["speedup"] == pytest.approx([1, None, 0.25, 0.125])
    assert scaling.read_curve("batch", points, {1: 0.0})["impossible"] == [], "where no peak is known"


@pytest.mark.parametrize("alone", [True, False])
def test_a_kernel_that_is_wrong_at_one_size_is_refused_though_the_results_are_near(
    quick: None, places: list[Backend], alone: bool
) -> None:
    def wrong(*arrays: Any, **params: Any) -> Any:
        y, *kept = OPS["add_layer_norm"].formula(numpy_module, *arrays, **params)
        if len(y) > 4:
            y[-1, -1] *= 1.0001
        return (y, *kept)

    with places[1].using({OPS["add_layer_norm"]: wrong}):
        found = measure(places[alone:], {"batch": (1, 2), "length": (2, 4)}, TINY, 3)
    refused = found["axes"]["batch"]["refused"]
    assert refused.startswith("batch 2: add_layer_norm on numba is wrong: y[7, 63]: expected")
    assert found["axes"]["batch"]["backends"] == {} and found["axes"]["length"]["refused"] == ""


def test_sides_that_do_other_work_are_refused(
    quick: None, monkeypatch: pytest.MonkeyPatch, places: list[Backend], capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*arrays: Any, **params: Any) -> Any:
        y, *kept = OPS["add_layer_norm"].formula(numpy_module, *arrays, **params)
        return (np.asarray(1.001 * y, y.dtype), *kept)

    with places[1].using({OPS["add_layer_norm"]: wrong}):
        found = measure(places, {"batch": (1, 2)}, TINY, 3, work="inference")
    facts = found["axes"]["batch"]
    assert "numba" in facts["refused"] and "not the same work" in facts["refused"]
    assert facts["backends"] == {} and facts["crossovers"] == []
    command.show(found)
    assert "refused" in capsys.readouterr().out


def test_a_side_that_is_right_only_on_what_it_has_seen_is_refused_after_the_timing(quick: None) -> None:
    points = [Point(Backend(name, numpy_module), 1, 1, nothing, nothing) for name in "ab"]
    points[1].unseen = lambda: np.full(1, 1.001)
    said = scaling._time("batch", points, 3, set(), lambda text: None)
    assert said.startswith("batch 1, after the timing: b is 1.0e-03")
    points[1].unseen = lambda: np.full(1, np.nan)
    assert "not the same work" in scaling._time("batch", points, 3, set(), lambda text: None)


def test_a_backend_whose_threads_cannot_be_set_is_left_out_of_that_axis(quick: None) -> None:
    fixed = Backend("fixed", numpy_module)
    found = measure([fixed, backends.get("numpy")], {"batch": (1, 2), "threads": (1, 2)}, TINY, 3)["axes"]
    assert list(found["batch"]["backends"]) == ["fixed", "numpy"] and found["batch"]["left_out"] == {}
    assert list(found["threads"]["backends"]) == ["numpy"] and "fixed" in found["threads"]["left_out"]


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_shows_and_writes_what_it_found(
    quick: None, monkeypatch: pytest.MonkeyPatch, places: list[Backend], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(command, "console", Console(width=80))
    files = tmp_path / "found.json", tmp_path / "found.csv"
    words = "--backends numpy,numba --batch 1,2,4 --length 4 --hidden 64 --threads 1,2 --rounds 3"
    assert run(monkeypatch, *words.split(), "--json", str(files[0]), "--csv", str(files[1])) == 0
    document = json.loads(files[0].read_text())
    assert document["ok"] and list(document["scaling"]["axes"]) == ["batch", "threads"]
    assert {"machine", "versions", "date"} <= set(document)
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (3 + 2)
    shown = capsys.readouterr().out
    tables = shown[shown.index("peak of the CPU") :]
    assert "batch^" in tables and "threads^" in tables and "efficiency" in tables and "…" not in tables
    took = document["scaling"]["axes"]["batch"]["backends"]["numba"]["seconds"][2]
    assert command._ms(took) in tables and command._ms(0.01234) == "12.34" and command._ms(0.1234) == "123.4"


def test_what_else_ran_on_the_machine_is_told(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = measure([backends.get("numpy")], {"batch": (1, 2)}, TINY, 3)
    curve = found["axes"]["batch"]["backends"]["numpy"]
    load = quiet.Load()
    load.average = None  # whatever runs beside this test
    curve["all"] = [[1.0, 1.0, 1.1], [1.0, 1.2, 1.2]]
    say_quiet(load.disturbance(1, command.turns(found)))
    assert "not quiet" not in capsys.readouterr().out
    curve["all"][1] = [1.0, 1.5, 2.0]
    say_quiet(load.disturbance(1, command.turns(found)))
    assert "not quiet: p20 to p80 of batch 2 on numpy is 40% of its median" in capsys.readouterr().out


def test_which_axes_and_which_base_sizes() -> None:
    def plan(axes: str = "", quick: bool = False, cores: int = 4, **given: str) -> Any:
        return command.plan({axis: given.get(axis, "") for axis in UNITS}, axes, quick, cores)

    sizes, base = plan()
    assert list(sizes) == list(UNITS) and sizes["threads"] == (1, 2, 4) and base == Base(threads=4)
    assert "threads" not in plan(cores=1)[0], "one core has none"
    assert plan("batch", length="128") == ({"batch": scaling.AXES["batch"]}, Base(length=128, threads=4))
    assert plan("", batch="1,3", hidden="64", threads="2", quick=True) == (
        {"batch": (1, 3), "length": scaling.QUICK_AXES["length"]}, Base(hidden=64, threads=2)
    )  # fmt: skip
    assert scaling.thread_counts(6) == (1, 2, 4, 6) and scaling.thread_counts(1) == (1,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--axes width", "--axes: expected batch, length"),
        ("--axes batch --batch 3", "--batch: expected two or more sizes"),
        ("--axes batch --length 3,4", "--length: expected one size"),
        ("--batch 4,2", "batch: expected two or more sizes, each larger"),
        ("--batch 1,x", "--batch: expected numbers"),
        ("--batch 0,1", "batch: expected 1 to"),
        ("--length 1,99999999999999999999", "length: expected 1 to"),
        ("--hidden 64,100", "hidden: expected multiples of 64"),
        ("--threads 1,5000", "threads: expected 1 to 1024"),
        ("--work backward", "--work: expected step or inference"),
        ("--rounds 2", "--rounds"),
        ("--backends nobody", "no backend is called"),
        ("--json nowhere/found.json", "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], places: list[Backend], words: str, said: str
) -> None:
    assert run(monkeypatch, *words.split()) == 2
    out, error = capsys.readouterr()
    assert said in error and error.count("\n") == 1 and out == ""


def test_a_backend_that_plays_another_machine_is_refused(places: list[Backend]) -> None:
    places[0] = Backend("actor", numpy_module)
    places[0].emulated = True
    with pytest.raises(UserError, match="actor plays another machine"):
        measure(places, {"batch": (1, 2)}, TINY, 3)


def test_the_limit_is_the_best_that_was_measured(monkeypatch: pytest.MonkeyPatch, places: list[Backend]) -> None:
    threads: list[int] = []

    def product(*shape: Any) -> tuple[float, str]:
        threads.append(places[1].num_threads())
        return 50.0, ""

    monkeypatch.setattr("minibert.lab.measure.peaks.fma_gflops", lambda: 70.0)
    monkeypatch.setattr("minibert.lab.measure.peaks.product_gflops", product)
    limits, before = {1: 90.0, 2: 60.0}, places[1].num_threads()
    scaling._raise_limits(limits, lambda text: None)
    assert limits == {1: 90.0, 2: 70.0} and threads == [1, 2] and places[1].num_threads() == before
