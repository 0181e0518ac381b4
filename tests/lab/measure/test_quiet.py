"""Ratios of times taken in turns, and when a machine is said not to have been quiet; no real load is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from minibert.lab.measure import quiet
from minibert.lab.measure.quiet import Load, Spread, load_words, ratio, spread, warning

STEADY = {"numpy": [1.0, 1.02, 0.98, 1.01, 0.99]}


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)


def played(monkeypatch: pytest.MonkeyPatch, average: float | None, others: float | None) -> Load:
    """A load that was as given, whatever this machine does."""
    monkeypatch.setattr(Load, "others", lambda self: others)
    load = Load()
    load.average = average
    return load


def test_a_slow_minute_that_falls_on_both_changes_no_ratio() -> None:
    found = ratio([2.0, 20.0, 2.0, 20.0, 20.0], [1.0, 10.0, 1.0, 10.0, 1.0])
    assert found == Spread(2.0, 2.0, pytest.approx(5.6)), "the ratio of the medians, 20 / 1, lies outside"


def test_one_turn_in_five_that_took_fifty_times_as_long_is_seen_beside_the_median() -> None:
    found = ratio([3.0] * 5, [1.0, 1.0, 50.0, 1.0, 1.0])
    assert found is not None and found.median == 3.0 and found.p20 < 3.0


@pytest.mark.parametrize(("theirs", "ours"), [([], []), ([1.0, 0.0], [1.0, 1.0]), ([1.0], [0.0])])
def test_where_no_time_passed_there_is_no_ratio(theirs: list[float], ours: list[float]) -> None:
    assert ratio(theirs, ours) is None


def test_the_spread_is_that_of_the_percentiles() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]) == Spread(3.5, 2.0, 5.0)
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0, 6.0]).relative == pytest.approx(3 / 3.5)


@pytest.mark.parametrize(
    ("threads", "average", "others", "said"),
    [
        (4, 0.1, 0.1, ""),
        (4, 3.9, 0.1, ""),  # one's own work of the minute before
        (4, 0.1, 0.5, "other programs kept 0.50 of 4 cores busy"),
        (2, 0.1, 2.1, ""),  # two cores are free for them
        (2, 0.1, 2.5, "other programs kept 2.50 of 4 cores busy"),
        (8, 0.1, 0.1, ""),
        (4, 0.7, None, "the load of the minute before was 0.70 on 4 cores"),
        (2, 2.2, None, ""),
        (4, None, None, ""),
    ],
)
def test_others_work_disturbs_where_it_leaves_too_few_cores(
    cores: None, monkeypatch: pytest.MonkeyPatch, threads: int, average: float | None, others: float | None, said: str
) -> None:
    found = played(monkeypatch, average, others).disturbance(threads, STEADY)
    assert found == {"load": average, "others": others, "cores": 4, "why": [said] if said else []}
    assert warning(found).startswith(f"the machine was not quiet: {said}. Measure again" if said else "")
    assert bool(warning(found)) is bool(said)


def test_times_that_spread_are_told_by_the_worst(cores: None, monkeypatch: pytest.MonkeyPatch) -> None:
    load = played(monkeypatch, 0.1, 0.0)
    slow = {"numba": [1.0, 1.0, 50.0, 1.0, 1.0], "cupy": [1.0, 1.2, 1.6], "torch": [], "numpy": STEADY["numpy"]}
    (why,) = load.disturbance(4, slow)["why"]
    assert why == "p20 to p80 of numba is 980% of its median, and 1 more of 3 by over 25%"
    many = {str(i): [1.0, 1.0, 1.0] for i in range(20)}
    assert load.disturbance(4, {**many, "one": [1.0, 2.0, 3.0]})["why"] == [], "one of many is no sign"


def test_the_load_in_words() -> None:
    assert load_words({"load": 0.314, "others": 0.02, "cores": 2}) == (
        "load 0.31 on 2 cores, 0.02 of them busy with other programs"
    )
    assert load_words({"load": 1.0, "others": None, "cores": 2}) == "load 1.00 on 2 cores"
    assert load_words({}) == "load not known"


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Path, list[float]]]:
    """The system's file of processor time in hundredths of a second, and this process's seconds and the clock."""
    file, now = tmp_path / "stat", [0.0, 0.0]
    monkeypatch.setattr(quiet, "PROC_STAT", file)
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    monkeypatch.setattr("os.times", lambda: (now[0], 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr("time.perf_counter", lambda: now[1])
    yield file, now
    monkeypatch.undo()


def test_others_are_what_the_processors_did_beside_this_process(clocks: tuple[Path, list[float]]) -> None:
    file, now = clocks
    file.write_text("cpu  100 0 50 1000 30 1 2 3 7 0\ncpu0 9 9 9 9\n")
    load = Load()
    now[:] = 4.0, 10.0
    file.write_text("cpu  600 100 150 2000 90 1 2 103 207 0\ncpu0 9 9 9 9\n")
    assert load.others() == pytest.approx((500 + 100 + 100 + 100) / 100 / 10 - 4.0 / 10)
    now[:] = 40.0, 10.0
    assert load.others() == 0.0, "ticks are counted more coarsely than a process's own time"
    now[1] = quiet.SHORTEST / 2
    assert load.others() is None, "too short for ticks"


@pytest.mark.parametrize("text", ["", "cpu 1 2\n", "intr a b c d e f g h i\n", None])
def test_where_the_system_does_not_say_nothing_is_known(clocks: tuple[Path, list[float]], text: str | None) -> None:
    file, now = clocks
    if text is not None:
        file.write_text(text)
    load = Load()
    now[1] = 10.0
    assert load.others() is None
