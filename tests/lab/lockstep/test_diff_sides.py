"""The sides of `minibert diff`: dtypes, threads, wrong kernels on either, traces; and the command."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli import main
from minibert.cli.diff_report import facts, verdict
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.lab.lockstep.assess import JUDGED_PIECE, assess
from minibert.lab.lockstep.diff import diff
from minibert.lab.lockstep.trace import Recording, Side, Store, key_of, load, record, save
from tests.small_steps import NUMBA, NUMPY, SMALL, assert_clean, batch, maker, wrong

pytestmark = pytest.mark.usefixtures("smaller_tiny")


def test_one_backend_against_itself_is_equal_to_the_bit() -> None:
    found = diff(Side(NUMBA), Side(NUMBA), maker(), batch())
    assert_clean(found)
    assert found.losses[0] == found.losses[1]
    assert all(row.outputs is not None and row.outputs.largest == 0 for row in found.rows)
    assert all(row.growth is None for row in found.rows)


def test_precision_of_a_side_is_its_own() -> None:
    found = diff(Side(NUMPY), Side(NUMBA, "float64"), maker(), batch())
    assert_clean(found)
    distances = [row.outputs.relative for row in found.rows if row.outputs is not None]
    assert 1e-9 < float(np.median(distances)) < 1e-6
    grown = [row for row in found.rows if row.growth is not None]
    assert grown and all(row.inputs is not None and row.inputs.relative > 0 for row in grown)


def test_threads_of_a_side_are_its_own() -> None:
    before = NUMBA.num_threads()
    seen = []

    def kernel(*arrays: Any, **params: Any) -> Any:
        seen.append(NUMBA.num_threads())
        own = NUMBA._find(OPS["gelu_grad"])
        assert own is not None
        return own(*arrays, **params)

    assert_clean(diff(Side(NUMBA), Side(NUMBA, threads=2, kernels={OPS["gelu_grad"]: kernel}), maker(), batch()))
    assert set(seen) == {2}
    assert NUMBA.num_threads() == before


def test_every_element_is_counted_once() -> None:
    found = diff(Side(NUMPY), Side(NUMBA), maker(), batch())
    norm = next(row for row in found.rows if row.op == "layer_norm")
    rows, columns = norm.shapes[0]
    assert norm.local is not None
    assert sum(norm.local.ulps.values()) == rows * columns + 2 * rows


def test_an_op_that_writes_in_place_is_judged_to_its_last_element() -> None:
    """Piece by piece; the element is named by its place in the whole."""
    op, count = OPS["adamw"], JUDGED_PIECE + 5
    rng = np.random.default_rng(0)
    param, grad, first = rng.standard_normal((3, count), dtype=np.float32)
    arrays = [param, grad, first, first * first, np.array(0.5, np.float32)]
    params = {"lr": 1e-3, "step": 3}
    right = NUMBA.run(op, *(a.copy() for a in arrays), **params)
    off = [right[0].copy(), *right[1:]]
    off[0][-1] += np.float32(0.1)
    clean, faulty = assess(op, arrays, params, [right, off])
    assert not clean.wrong and faulty.wrong
    assert faulty.judgement.worst is not None and faulty.judgement.worst.place == (count - 1,)
    assert sum(clean.ulps.values()) == sum(faulty.ulps.values()) == 3 * count


def test_side_a_may_be_the_wrong_one() -> None:
    side = Side(NUMBA, kernels={OPS["gelu_grad"]: wrong("gelu_grad")})
    found = diff(side, Side(NUMPY), maker(), batch())
    assert found.culprit is not None
    assert (found.culprit.op, found.culprit.side) == ("gelu_grad", "A")
    assert "side A (numba) is wrong: dx[" in verdict(found)
    both = diff(side, side, maker(), batch())
    assert both.culprit is not None and both.culprit.side == "both"
    assert "both sides (numba, numba) are wrong" in verdict(both)


def test_what_a_kernel_remembers_is_found() -> None:
    last: dict[tuple[int, ...], Any] = {}
    honest = wrong("gelu_grad", 1.0)

    def stale(g: Any, x: Any, **params: Any) -> Any:
        right = honest(g, x, **params)
        given, last[g.shape] = last.get(g.shape, right), right
        return given

    found = diff(Side(NUMPY), Side(NUMBA, kernels={OPS["gelu_grad"]: stale}), maker(), batch())
    assert found.culprit is not None
    assert (found.culprit.op, found.culprit.side) == ("gelu_grad", "B")


def _in_turn(turns: Iterator[Callable[..., Any]], *arrays: Any, **params: Any) -> Any:
    return next(turns)(*arrays, **params)


def test_what_b_gets_wrong_in_its_own_step_alone_is_found() -> None:
    """And what it gets wrong on A's inputs alone."""
    for own in (True, False):
        turns = itertools.cycle([wrong("gelu_grad"), wrong("gelu_grad", 1.0)][:: 1 if own else -1])
        kernel = partial(_in_turn, turns)
        row = diff(Side(NUMPY), Side(NUMBA, kernels={OPS["gelu_grad"]: kernel}), maker(), batch()).culprit
        assert row is not None and row.b is not None and row.local is not None
        assert (row.op, row.side, row.b.wrong, row.local.wrong) == ("gelu_grad", "B", own, not own)


def test_an_input_that_was_changed_is_found() -> None:
    honest = wrong("gelu_grad", 1.0)

    def careless(g: Any, x: Any, **params: Any) -> Any:
        result = honest(g, x, **params)
        x[0] = 0
        return result

    found = diff(Side(NUMPY), Side(NUMBA, kernels={OPS["gelu_grad"]: careless}), maker(), batch())
    assert found.culprit is not None
    assert (found.culprit.op, found.culprit.side) == ("gelu_grad", "B")
    assert "input x was changed" in verdict(found)


@pytest.mark.parametrize(
    "kernel, said",
    [
        (lambda g, x, **_: 1 / 0, "raised ZeroDivisionError"),
        (lambda g, x, **_: g[:1], "expected shape"),
        (lambda g, x, **_: g * np.float32("nan"), "got nan"),
    ],
    ids=["raises", "shape", "nan"],
)
def test_a_step_that_breaks_down_has_a_culprit(kernel: Any, said: str) -> None:
    sides = Side(NUMPY), Side(NUMBA, kernels={OPS["gelu_grad"]: kernel})
    found = diff(*sides, maker(), batch())
    assert found.culprit is not None
    assert (found.culprit.op, found.culprit.side) == ("gelu_grad", "B")
    assert said in verdict(found)
    other_way = diff(*reversed(sides), maker(), batch())
    assert other_way.culprit is not None
    assert (other_way.culprit.op, other_way.culprit.side) == ("gelu_grad", "A")
    assert said in verdict(other_way)
    json.dumps(facts(found), allow_nan=False)


def test_weights_that_are_not_finite_are_the_users_to_mend() -> None:
    def make(backend: Any, dtype: str) -> Any:
        model = maker()(backend, dtype)
        model.bert.encoder.layer[0].output.dense.weight.data[0, 0] = np.nan
        return model

    with pytest.raises(UserError, match="are the weights finite"):
        diff(Side(NUMPY), Side(NUMBA), make, batch())


def test_sides_that_run_other_calls_part() -> None:
    def make(backend: Any, dtype: str) -> Any:
        deeper = backend is NUMBA
        return maker(dataclasses.replace(SMALL, num_hidden_layers=2 if deeper else 1))(backend, dtype)

    found = diff(Side(NUMPY), Side(NUMBA), make, batch())
    assert found.culprit is None and not found.ok
    assert "side A calls gather_rows in cls.predictions" in found.parted
    assert "side B concatenate in bert.encoder.layer.1.attention.self" in found.parted
    assert "PARTED" in verdict(found)


# -------------------------------------------------------------------------------------------------------------- traces


def recorded(tmp_path: Path, side: Side, seed: int = 0) -> Recording:
    path = tmp_path / "a.safetensors"
    save(record(side, maker(seed=seed), batch()), path, {"settings": {}})
    return load(path)


def test_a_trace_takes_either_side(tmp_path: Path) -> None:
    trace = recorded(tmp_path, Side(NUMBA))
    live = diff(Side(NUMBA), Side(NUMPY), maker(), batch())
    as_a = diff(trace, Side(NUMPY), maker(), batch())
    assert_clean(as_a)
    assert as_a.losses == live.losses
    assert [row.outputs for row in as_a.rows] == [row.outputs for row in live.rows]
    as_b = diff(Side(NUMPY), trace, maker(), batch())
    assert_clean(as_b)
    assert all(row.local is None for row in as_b.rows)
    with pytest.raises(UserError, match="two traces"):
        diff(trace, trace, maker(), batch())


def test_a_fault_in_a_trace_is_that_sides(tmp_path: Path) -> None:
    trace = recorded(tmp_path, Side(NUMBA, kernels={OPS["attention_grad"]: wrong("attention_grad")}))
    for sides, side in (((trace, Side(NUMPY)), "A"), ((Side(NUMPY), trace), "B")):
        found = diff(*sides, maker(), batch())
        assert found.culprit is not None
        assert (found.culprit.op, found.culprit.side) == ("attention_grad", side)
        assert found.culprit.place == "bert.encoder.layer.1.attention.self"


def test_what_a_trace_cannot_tell_is_said(tmp_path: Path) -> None:
    """One weight differs from that of the machine that recorded: ops that read it are not judged on that side."""
    trace = recorded(tmp_path, Side(NUMBA))

    def make(backend: Any, dtype: str) -> Any:
        model = maker()(backend, dtype)
        model.bert.encoder.layer[0].output.dense.weight.data[0, 0] += np.float32(1e-3)
        return model

    for sides, unjudged in (((trace, Side(NUMPY)), "a"), ((Side(NUMPY), trace), "b")):
        found = diff(*sides, make, batch())
        untold = [row for row in found.rows if getattr(row, unjudged) is None]
        assert [row.op for row in untold] == ["linear", "matmul", "adamw"]
        assert {row.place for row in untold} == {"bert.encoder.layer.0.output.dense", ""}
        assert found.ok and found.unjudged == 3
        assert "88 calls within their bounds on both sides; of 3 more a trace does not" in verdict(found)
        assert all(row.inputs is None and row.outputs is not None for row in untold)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    model = maker()(NUMPY, "float32")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="--record"):
        load(tmp_path / "model.safetensors")


def test_a_trace_that_lacks_an_output_is_refused(tmp_path: Path) -> None:
    made = record(Side(NUMBA), maker(), batch())
    del made.store.arrays[made.calls[5].outputs[0]]
    save(made, tmp_path / "a.safetensors", {})
    with pytest.raises(UserError, match="an output of linear is missing"):
        load(tmp_path / "a.safetensors")


def test_what_exceeds_the_memory_goes_to_a_file() -> None:
    store = Store(limit=100)
    arrays = [np.arange(n, dtype=np.float32).reshape(shape) for n, shape in ((20, (4, 5)), (30, (30,)), (0, (0, 3)))]
    arrays += [np.array(2.5), np.arange(60).reshape(3, 20).T.copy()]
    keys = [store.keep(a) for a in arrays]
    assert store.held <= 100 < store.size
    for key, array in zip(keys, arrays, strict=True):
        got = store.get(key)
        assert got is not None and got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
    size = store.size
    assert store.keep(arrays[1].copy()) == keys[1] and store.size == size  # once
    assert store.get(key_of(np.zeros(7))) is None
    small = record(Side(NUMBA), maker(), batch(), limit=1 << 16)
    assert small.store.size > 1 << 16
    assert_clean(diff(small, Side(NUMPY), maker(), batch()))


# --------------------------------------------------------------------------------------------------------- command line

KERNEL = """
import numpy as np

def off(g, x, approximate="none"):
    from minibert.kernels.activation import gelu_grad
    from minibert.kernels.array_module import numpy_module
    return gelu_grad.formula(numpy_module, g, x, approximate=approximate) * np.float32(1.001)

def softmax(x):
    return x
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of `minibert diff`, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["minibert", "diff", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--tokens", "100", "--max-seq-length", "48"]
    file = tmp_path / "mine.py"
    file.write_text(KERNEL)
    facts_file, trace = tmp_path / "facts.json", str(tmp_path / "trace.safetensors")

    status, out, _ = run(
        capsys, "numpy", "numba", *small, "--kernel", f"{file}:off=gelu_grad", "--json", str(facts_file)
    )
    assert status == 1
    assert out.startswith("CULPRIT gelu_grad in cls.predictions.transform (backward, call ")
    assert "side B (numba) is wrong: dx[" in out.partition("\n")[0]
    found = json.loads(facts_file.read_text())
    assert {k: found["culprit"][k] for k in ("op", "phase", "place", "side")} == {
        "op": "gelu_grad", "phase": "backward", "place": "cls.predictions.transform", "side": "B",
    }  # fmt: skip
    assert found["culprit"]["bound_share"] > 1
    assert found["culprit"]["element"]["got"] != found["culprit"]["element"]["expected"]
    row = found["calls"][found["culprit"]["call"] - 1]
    assert row["op"] == "gelu_grad" and row["wrong"] == "B" and row["local"]["ulps"]
    assert all(set(r) >= {"shapes", "a", "b", "local", "growth", "inputs_apart"} for r in found["calls"])

    status, out, _ = run(capsys, "numba", *small, "--record", trace, "--json", str(facts_file))
    assert status == 0 and "91 calls" in out
    found = json.loads(facts_file.read_text())
    assert found["trace"] == trace and len(found["calls"]) == 91 and found["loss"]["a"] == load(Path(trace)).loss
    assert found["calls"][0]["op"] == "embedding" and found["calls"][0]["phase"] == "forward"
    status, out, _ = run(capsys, trace, "numpy", *small, "--all", "--json", str(facts_file))
    assert status == 0
    assert out.startswith("no culprit: 91 calls within their bounds on both sides\n")
    assert json.loads(facts_file.read_text())["culprit"] is None
    assert out.count("linear_grad") == 10

    for mistake, said in (
        (["numba"], "expected two sides"),
        (["numba", "numpyy"], "no backend is called 'numpyy'"),
        (["numba", str(tmp_path / "none.safetensors")], "No such file"),
        (["numba", trace, "--seed", "1", *small], "--seed 0, here it is 1"),
        (["numba", trace, "--kernel", f"{file}:off=gelu_grad", *small], "need a backend there"),
        (["numba", "numpy", "--record", trace], "leave out B"),
        (["numba", "--record", trace, "--step", "2", *small], "leave out --step"),
        (["numba", "--b-dtype", "float16"], "not 'float16'"),
        (["numba", "--kernel", f"{file}:softmax=softmax", *small], "no step calls softmax"),
    ):
        status, _, err = run(capsys, *mistake)
        assert status == 2, mistake
        assert said in err and err.count("\n") == 1, err
