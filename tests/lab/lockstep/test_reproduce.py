"""The smallest call that still goes wrong, and the test that `minibert bisect` writes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.kernels import OPS
from minibert.kernels.op import Op
from minibert.lab.conform.own_kernels import load_kernels
from minibert.lab.lockstep.bisect import bisect
from minibert.lab.lockstep.diff import Evidence
from minibert.lab.lockstep.reproduce import Case, run_call, smallest
from minibert.lab.lockstep.trace import Side
from tests.lab.lockstep.test_diff import passes
from tests.small_steps import NUMBA, NUMPY, batch, maker, wrong

GELU_GRAD = OPS["gelu_grad"]


def evidence_of(op: Op, kernel: Callable[..., Any]) -> tuple[Evidence, Side]:
    side = Side(NUMBA, kernels={op: kernel})
    evidence = bisect(Side(NUMPY), side, maker(), lambda number: batch(), 1).found.evidence
    assert evidence is not None
    return evidence, side


def test_an_error_of_every_element_is_shown_on_one() -> None:
    evidence, side = evidence_of(GELU_GRAD, wrong("gelu_grad"))
    found = smallest(evidence, side)
    assert found is not None and [x.shape for x in found.inputs] == [(1, 1), (1, 1)]


def test_rows_go_with_their_sequence() -> None:
    sound = NUMBA._find(OPS["attention"])

    def wrong_in_the_last(qkv: Any, cu_seqlens: Any, **params: Any) -> Any:
        y, lse = sound(qkv, cu_seqlens, **params)
        y[cu_seqlens[-2] :] *= y.dtype.type(1.001)
        return y, lse

    evidence, side = evidence_of(OPS["attention"], wrong_in_the_last)
    found = smallest(evidence, side)
    assert found is not None
    rows = found.inputs[0].shape[0]
    assert found.inputs[1].tolist() == [0, rows] and rows < len(evidence.inputs[0])


def test_what_does_not_go_wrong_by_itself_has_no_case() -> None:
    evidence, _ = evidence_of(GELU_GRAD, wrong("gelu_grad"))
    assert smallest(evidence, Side(NUMBA)) is None


def test_a_kernel_that_changes_an_input_is_wrong_by_itself() -> None:
    def careless(g: Any, x: Any, **params: Any) -> Any:
        result = NUMBA._find(GELU_GRAD)(g, x, **params)
        g *= 2
        return result

    evidence, side = evidence_of(GELU_GRAD, careless)
    found = smallest(evidence, side)
    assert found is not None
    assert run_call(side, GELU_GRAD, found.params, found.inputs).judgement.problem == "input g was changed"


def test_a_path_or_message_with_quotes_makes_a_test_that_runs(tmp_path: Path) -> None:
    folder = tmp_path / 'Anna\'s "own"'
    folder.mkdir()
    (folder / "k.py").write_text("def double(x, *, factor):\n    return x * (factor + 1)\n")
    evidence = Evidence(OPS["scale"], {"factor": 2.0}, [np.ones(3, np.float32)], "B")
    case = Case(evidence, Side(NUMBA), [f"{folder / 'k.py'}:double=scale"], 'it said """no\\x"""')
    test, _ = case.write(tmp_path / "found")
    assert not passes(test)
    (folder / "k.py").write_text("def double(x, *, factor):\n    return x * factor\n")
    assert passes(test)


def test_what_bisect_writes_stands_side_by_side(tmp_path: Path) -> None:
    """pytest takes one module of a name, wherever it lies: each case has a name of its own, in each folder."""
    ones = [Evidence(OPS["scale"], {"factor": 2.0}, [np.full(3, x, np.float32)], "B") for x in (1, 2)]
    one, other = (Case(evidence, Side(NUMBA), (), "said") for evidence in ones)
    first, data = one.write(tmp_path / "a")
    written = [first, other.write(tmp_path / "a")[0], one.write(tmp_path / "b")[0]]
    assert len({path.name for path in written}) == 3
    kept = first.read_text(), data.read_bytes()
    assert one.write(tmp_path / "a") == (first, data) and (first.read_text(), data.read_bytes()) == kept, "a second run"
    first.write_text("# mine by now\n")
    after, _ = one.write(tmp_path / "a")
    assert after.stem == f"{first.stem}_2" and first.read_text() == "# mine by now\n"
    assert all(f"def {path.stem}():" in path.read_text() for path in (*written[1:], after))


def test_a_test_makes_as_many_calls_as_the_kernel_takes_to_go_wrong(tmp_path: Path) -> None:
    wears = "seen = []\n\ndef double(x, *, factor):\n    seen.append(x)\n    return x * (factor + (len(seen) > 2))\n"
    (tmp_path / "k.py").write_text(wears)
    specs = [f"{tmp_path / 'k.py'}:double=scale"]
    side = Side(NUMBA, kernels=dict(load_kernels(specs)))
    evidence = Evidence(OPS["scale"], {"factor": 2.0}, [np.ones((5, 7), np.float32)], "B", calls=3)
    assert smallest(evidence._replace(calls=2), side) is None, "a test of it would pass before the mend"
    found = smallest(evidence, side)
    assert found is not None and found.inputs[0].shape == (1, 1)
    test, _ = Case(found, side, specs, "said").write(tmp_path)
    assert "calls=3" in test.read_text() and not passes(test)
    (tmp_path / "k.py").write_text(wears.replace("len(seen) > 2", "0"))
    assert passes(test)


def test_inputs_in_sixteen_bits_come_back_as_they_were(tmp_path: Path) -> None:
    pytest.importorskip("ml_dtypes")
    from minibert.backends.base import dtype_of

    x = np.linspace(-2, 2, 12).astype(dtype_of("bfloat16")).reshape(3, 4)
    case = Case(Evidence(OPS["scale"], {"factor": 2.0}, [x], "B"), Side(NUMBA), (), "said")
    test, data = case.write(tmp_path)
    with np.load(data) as stored:
        assert np.array_equal(stored["input_0"].view(x.dtype), x)
    assert "bfloat16" in test.read_text()


def test_run_call_reports_what_a_kernel_raises() -> None:
    def breaks(*arrays: Any, **params: Any) -> Any:
        raise ValueError("of no use")

    evidence, _ = evidence_of(GELU_GRAD, wrong("gelu_grad"))
    tried = run_call(Side(NUMBA, kernels={GELU_GRAD: breaks}), GELU_GRAD, evidence.params, evidence.inputs)
    assert not tried.judgement.ok and "of no use" in tried.judgement.problem and not tried.got
