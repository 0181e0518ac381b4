"""`minibert bisect` and `minibert diff --steps`: runs of many steps. test_diff.py has the faults of single steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli import main
from minibert.cli.bisect import said
from minibert.cli.drift_report import drift_facts, drift_verdict
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.op import Op
from minibert.lab.lockstep.bisect import JUDGED, NOISE, STANDS_OUT, StepDistance, bisect
from minibert.lab.lockstep.drift import drift
from minibert.lab.lockstep.reproduce import run_call, smallest
from minibert.lab.lockstep.trace import Side, Training
from tests.lab.lockstep.test_diff import passes
from tests.small_steps import NUMBA, NUMPY, TINY, batch, maker, tiny_batch, wrong

pytestmark = pytest.mark.usefixtures("smaller_tiny")

MOST_JUDGED = JUDGED * len(NOISE)
ADAMW, GELU_GRAD = OPS["adamw"], OPS["gelu_grad"]


def small_batch(number: int) -> Any:
    """Another batch in each step."""
    return batch(64, seed=number, lengths=(7, 5, 1 + number % 3))


def from_step(first: int, last: int = 10**6, factor: float = 1.01) -> Callable[..., Any]:
    """AdamW that goes too far in some steps."""

    def kernel(*arrays: Any, **params: Any) -> Any:
        further = factor if first <= params["step"] <= last else 1.0
        return NUMBA._find(ADAMW)(*arrays, **{**params, "lr": params["lr"] * further})

    return kernel


@pytest.mark.parametrize("first", [1, 2, 7, 12])
def test_the_first_wrong_step_of_a_run_is_found(first: int) -> None:
    run = bisect(Side(NUMPY), Side(NUMBA, kernels={ADAMW: from_step(first)}), maker(TINY), small_batch, 12)
    assert run.first == first and run.found.culprit is not None
    assert run.found.culprit.op == "adamw" and run.found.culprit.side == "B"
    assert len(run.judged) <= 1 + MOST_JUDGED + math.ceil(math.log2(12)), "so it went through them one by one"
    assert all(found.ok == (step < first) for step, found in run.judged.items())


def test_one_wrong_step_among_many_stands_out() -> None:
    """By more than the other steps' noise: where a gradient is all but zero, rounding decides how far AdamW goes."""
    run = bisect(Side(NUMPY), Side(NUMBA, kernels={ADAMW: from_step(9, 9)}), maker(TINY), small_batch, 16)
    assert run.first == 9


def test_of_two_wrong_steps_the_first_is_named() -> None:
    def twice(*arrays: Any, **params: Any) -> Any:
        factor = {4: 1.01, 9: 1.01}.get(params["step"], 1.0)
        return NUMBA._find(ADAMW)(*arrays, **{**params, "lr": params["lr"] * factor})

    run = bisect(Side(NUMPY), Side(NUMBA, kernels={ADAMW: twice}), maker(TINY), small_batch, 12)
    assert run.first == 4


def test_a_kernel_that_is_wrong_once_is_unsteady() -> None:
    calls = 0

    def flaky(*arrays: Any, **params: Any) -> Any:
        nonlocal calls
        calls += params["step"] == 5
        factor = 1.01 if calls == 1 else 1.0
        return NUMBA._find(ADAMW)(*arrays, **{**params, "lr": params["lr"] * factor})

    run = bisect(Side(NUMPY), Side(NUMBA, kernels={ADAMW: flaky}), maker(TINY), small_batch, 8)
    assert run.first is None and run.unsteady == 5 and not run.ok
    assert "UNSTEADY" in said(run) and "step 5 of 8" in said(run)


class Wears:
    """A right kernel whose results are a percent too large at some of its calls: `anew` has none behind it."""

    def __init__(self, op: Op, at: Callable[[int], bool]) -> None:
        self.op, self.at, self.calls = op, at, 0

    def anew(self) -> Wears:
        return Wears(self.op, self.at)

    def __call__(self, *arrays: Any, **params: Any) -> Any:
        self.calls += 1
        return wrong(self.op.name, 1.01 if self.at(self.calls) else 1.0)(*arrays, **params)


@pytest.mark.parametrize(
    ("op", "at", "step", "call"),
    [
        ("gelu_grad", lambda n: n >= 12, 6, 12),  # two calls in a step
        ("gelu_grad", lambda n: n == 12, 6, 12),
        ("gelu_grad", lambda n: n >= 3, 2, 3),  # while the first step is judged
        ("linear_cross_entropy", lambda n: n >= 9, 9, 9),
        ("gelu_grad", lambda n: n >= 1, 1, 1),
    ],
)
def test_a_kernel_that_goes_wrong_after_some_calls_is_found_by_their_number(
    op: str, at: Callable[[int], bool], step: int, call: int
) -> None:
    side = Side(NUMBA, kernels={OPS[op]: Wears(OPS[op], at)})
    run = bisect(Side(NUMPY), side, maker(TINY), small_batch, 10)
    assert run.first == step and run.unsteady is None
    assert run.found.culprit is not None and run.found.culprit.op == op
    assert run.found.evidence is not None and run.found.evidence.calls == call
    assert (f"kernel {op} goes wrong at its call {call} (step {step})" in said(run)) == (call > 1)
    found = smallest(run.found.evidence, side)
    assert found is not None and found.calls == call
    again = run_call(side.anew(), found.op, found.params, found.inputs, call)
    before = run_call(side.anew(), found.op, found.params, found.inputs, call - 1) if call > 1 else None
    assert not again.judgement.ok and (before is None or before.judgement.ok)


def test_a_clean_run_has_no_culprit() -> None:
    run = bisect(Side(NUMPY), Side(NUMBA), maker(TINY), small_batch, 9)
    assert run.first is None and run.found.ok
    assert [d.step for d in run.distances] == list(range(1, 10))
    assert 1 + JUDGED <= len(run.judged) <= 1 + MOST_JUDGED


def test_what_breaks_a_step_of_b_is_a_step_that_stands_out() -> None:
    def breaks(*arrays: Any, **params: Any) -> Any:
        if params["step"] == 6:
            raise ValueError("not today")
        return NUMBA._find(ADAMW)(*arrays, **params)

    run = bisect(Side(NUMPY), Side(NUMBA, kernels={ADAMW: breaks}), maker(TINY), small_batch, 8)
    assert run.first == 6
    assert run.found.culprit is not None and run.found.culprit.worst is not None
    assert "not today" in run.found.culprit.worst.judgement.problem


def test_a_side_that_cannot_be_run_again_is_refused() -> None:
    calls = 0

    def other_each_time(x: Any, weight: Any, bias: Any) -> Any:
        nonlocal calls
        calls += 1
        return (x @ weight.T + bias) * x.dtype.type(1 + 3e-7 * (calls % 5))  # within its bound

    a = Side(NUMPY, kernels={OPS["linear"]: other_each_time})
    with pytest.raises(UserError, match=r"gave a loss of .* when it was run again"):
        bisect(a, Side(NUMBA), maker(TINY), small_batch, 9)


def test_no_step_stands_out_by_less_than_noise() -> None:
    first = StepDistance(1, gradients=1e-9, updates=4.0, loss=0.0)
    assert StepDistance(2, gradients=5e-8, updates=9.0, loss=1e-9).against(first) <= 1
    assert StepDistance(3, gradients=1e-4, updates=4.0, loss=0.0).against(first) > 100
    assert StepDistance(4, gradients=1e-9, updates=1e4, loss=0.0).against(first) > 100
    assert StepDistance(5, 0.0, 0.0, 0.0, "raised ValueError").against(first) == math.inf


# Each is wrong by a percent in one step of its own, told by the step that AdamW is told: the one before is finished.
SMALL_FAULTS: dict[str, Callable[..., Any]] = {
    "learning rate": lambda lr, **_: {"lr": lr * 1.01},
    "first moment": lambda beta1, **_: {"beta1": 1 - (1 - beta1) * 1.01},
    "second moment": lambda beta2, **_: {"beta2": 1 - (1 - beta2) * 1.01},
    "epsilon": lambda eps, **_: {"eps": eps * 1.01},
}
OFTEN_WRONG = (
    "linear_cross_entropy", "gelu_grad", "layer_norm_grad", "add_layer_norm_grad", "attention_grad", "linear_grad",
    "scatter_rows", "square_norm", "clip_scale",
)  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
def test_a_percent_stands_out_wherever_it_is_planted(seed: int) -> None:
    """An update is measured on the gradient that it was made from: the gradient's noise does not hide it."""
    faults = dict(zip((2 * n + 3 for n in range(13)), (*SMALL_FAULTS, *OFTEN_WRONG), strict=True))
    step = 1

    def updated(*arrays: Any, **params: Any) -> Any:
        change = SMALL_FAULTS.get(faults.get(params["step"], ""))
        return NUMBA._find(ADAMW)(*arrays, **params | (change(**params) if change else {}))

    def at_times(name: str) -> Callable[..., Any]:
        right, slightly = wrong(name, 1.0), wrong(name)
        return lambda *arrays, **params: (slightly if faults.get(step) == name else right)(*arrays, **params)

    def batch_of(number: int) -> Any:
        nonlocal step
        step = number + 1
        return small_batch(number + 100 * seed)

    kernels = {ADAMW: updated, **{OPS[name]: at_times(name) for name in OFTEN_WRONG}}
    run = bisect(Side(NUMPY), Side(NUMBA, kernels=kernels), maker(TINY, seed), batch_of, 30)
    first, *rest = run.distances
    assert {d.step for d in rest if d.against(first) > 10 * STANDS_OUT} == faults.keys()
    assert all(d.against(first) < STANDS_OUT for d in rest if d.step not in faults)
    assert run.first == 3


def test_weights_that_decay_too_much_by_a_percent_are_found_where_that_is_more_than_rounding() -> None:
    """Decay moves a weight by lr 0.01 of itself: of 1 % of that float32 keeps nothing below lr = 1e-3."""

    def kernel(*arrays: Any, weight_decay: float, **params: Any) -> Any:
        return NUMBA._find(ADAMW)(*arrays, weight_decay=weight_decay * (1.01 if params["step"] == 3 else 1), **params)

    run = bisect(Side(NUMPY), Side(NUMBA, kernels={ADAMW: kernel}), maker(TINY), small_batch, 5, learning_rate=0.1)
    assert run.first == 3
    assert run.distances[2].measure("updates", run.distances[0]) > STANDS_OUT


def test_a_run_goes_on_exactly_from_its_state() -> None:
    one, other = (Training(Side(NUMBA), maker(TINY), small_batch) for _ in range(2))
    for _ in range(3):
        one.step()
    other.restore(one.state())
    assert [one.step(), one.step()] == [other.step(), other.step()]
    kept, again = one.state(), other.state()
    assert kept.keys() == again.keys() and all(np.array_equal(kept[name], again[name]) for name in kept)


# ----------------------------------------------------------------------------------------------------------- many steps


def test_two_clean_sides_stay_in_their_bounds_over_many_steps() -> None:
    found = drift(Side(NUMPY), Side(NUMBA), maker(TINY), small_batch, 60)
    assert found.ok and len(found.steps) == 60, drift_verdict(found, 60)
    assert {"adamw", "dropout", "attention_grad"} <= {op.op for op in found.ops.values()}
    assert all(op.shares[name] <= 1 for op in found.ops.values() for name in ("a", "b", "local"))
    assert not any(op.unjudged for op in found.ops.values())
    adamw = found.ops["adamw", "optimiser"]
    assert adamw.calls == 120 and len(adamw.inherited) == 60
    assert adamw.inherited[0] < 1e-5 < 10 * max(adamw.inherited), "errors are inherited"
    assert found.steps[-1].weights_apart > found.steps[0].weights_apart > 0
    assert found.steps[-1].weights_apart < 1e-3
    assert f"{found.calls} calls within their bounds" in drift_verdict(found, 60)


def test_a_run_ends_with_the_step_that_is_wrong() -> None:
    found = drift(Side(NUMPY), Side(NUMBA, kernels={ADAMW: from_step(4)}), maker(TINY), small_batch, 9)
    assert not found.ok and len(found.steps) == 3
    assert drift_verdict(found, 9).startswith("step 4 of 9: ")
    facts = drift_facts(found)
    assert facts["found"]["step"] == 4 and facts["found"]["culprit"]["op"] == "adamw"
    assert json.loads(json.dumps(facts, allow_nan=False))["ok"] is False


def test_local_and_inherited_error_are_told_apart() -> None:
    """A side that begins elsewhere inherits, and adds nothing."""

    def make(backend: Any, dtype: str) -> Any:
        model = maker(TINY)(backend, dtype)
        if backend is NUMBA:
            state = model.state_dict()
            model.load_state_dict({name: x * np.float32(1 + 1e-5) for name, x in state.items()})
        return model

    found = drift(Side(NUMPY), Side(NUMBA), make, lambda number: tiny_batch(), 2)
    assert found.ok
    norm = found.ops["add_layer_norm", "forward"]
    assert norm.inherited[0] > 1e-6 and norm.shares["local"] <= 1


# ----------------------------------------------------------------------------------------------------- the command line


MINE = """
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module


def decayed(*arrays, step, lr, **params):
    lr = lr * (1.01 if step > 2 else 1)
    new = OPS["adamw"].formula(numpy_module, *arrays, step=step, lr=lr, **params)
    for old, values in zip((arrays[0], *arrays[2:4]), new):
        old[...] = values
    return new
"""
QUICK = ["--tokens", "32", "--max-seq-length", "16", "--threads", "1"]


def run_command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["minibert", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command_finds_writes_and_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    words = ["bisect", "numpy", "--kernel", "mine.py:decayed=adamw", "--steps", "4", "-o", "found", "--json", "f.json"]
    assert run_command(monkeypatch, *words, *QUICK) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("step 3 of 4 ") and "CULPRIT adamw (optimiser" in printed
    (test,) = (tmp_path / "found").glob("test_adamw_on_numpy_*.py")
    assert f"python -m pytest found/{test.name}" in printed and not passes(test)
    facts = json.loads((tmp_path / "f.json").read_text())
    assert facts["first"] == 3 and facts["found"]["culprit"]["op"] == "adamw" and len(facts["distances"]) == 4
    (tmp_path / "mine.py").write_text(MINE.replace("1.01", "1"))
    assert passes(test)
    assert run_command(monkeypatch, *words[:-4], *QUICK) == 0
    assert capsys.readouterr().out.startswith("no culprit in 4 steps")


def test_many_steps_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "drift.json"
    assert run_command(monkeypatch, "diff", "numpy", "numba", "--steps", "2", "--json", str(file), *QUICK) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no culprit in 2 steps: ") and "inherited" in printed
    assert len(json.loads(file.read_text())["steps"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bisect", "numpy"], "expected two sides"),
        (["bisect", "numpy", "numba", "--output", "{file}/sub"], "is a file: name a folder"),
        (["diff", "numba", ""], "no backend is called ''"),
        (["bisect", "numpy", "nonesuch"], "nonesuch"),
        (
            ["bisect", "numpy", "--b-dtype", "float46"],
            "--b-dtype: backend numpy has arrays of float32, float64, float16, bfloat16: not",
        ),
        (["diff", "numpy", "numba", "--steps", "2", "--step", "2"], "leave out --step"),
        (["diff", "numpy", "--steps", "2", "--record", "{new}"], "leave out --step, --record"),
        (["diff", "numpy", "numba", "--products", "tf32"], "--products: expected float32 on numpy, numba, got 'tf32'"),
    ],
    ids=lambda x: "-".join(x[:4]).replace("/", "") if isinstance(x, list) else "",
)
def test_a_mistake_is_one_line(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    given = [word.format(file=tmp_path / "file", new=tmp_path / "new") for word in words]
    assert run_command(monkeypatch, *given) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
