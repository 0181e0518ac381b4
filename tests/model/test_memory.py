"""A training step in memory: gradients are made in their place, and once it is warm no page faults."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.kernels.adjoining import adjoining
from minibert.kernels.embedding import add_rows, scatter_rows
from minibert.kernels.linear import add_linear_grad, linear, linear_grad
from minibert.kernels.op import Op, outputs
from minibert.kernels.view import concatenate
from minibert.lab.lockstep import assess
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.tensor import Tensor, apply
from minibert.train.optim import AdamW, parameter_groups

NUMBA, NUMPY = backends.get("numba"), backends.get("numpy")
SMALL = BertConfig(
    vocab_size=61, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=12,
)  # fmt: skip
IDS = np.random.default_rng(3).integers(1, 61, (2, 11))
LABELS = np.where(np.random.default_rng(4).random((2, 11)) < 0.4, IDS, -100)


def model_and_optimiser(backend: Backend, dtype: str = "float32") -> tuple[BertForMaskedLM, AdamW]:
    model = BertForMaskedLM(SMALL, backend, dtype, seed=5).train()
    return model, AdamW(parameter_groups(model, 0.01), lr=1e-2)


def flat(rows: np.ndarray, *counts: int) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(counts)[:-1])


# -------------------------------------------------------------------------------------------- gradients in their place


@pytest.mark.parametrize("backend", [NUMPY, NUMBA], ids=["numpy", "numba"])
def test_an_output_is_written_where_it_is_wanted_by_kernel_or_copy(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    g, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((33, 7), (33, 5)))
    expected = backend.run(linear_grad, g, x)
    for places in ((np.full((7, 5), np.nan, np.float32), None), (None, np.full(7, np.nan, np.float32))):
        seen = []

        def watch(op: Op, arrays: Any, params: Any, call: Any, seen: list[Any] = seen) -> Any:
            seen.append((op, dict(params)))
            return call()

        with backend.watched_by(watch):
            got = backend.run(linear_grad, g, x, into=places)
        assert seen == [(linear_grad, {})]  # who watches sees the call as it always is
        for result, place, value in zip(got, places, expected, strict=True):
            assert place is None or result is place
            np.testing.assert_array_equal(result, value)


def test_every_kernel_that_takes_places_writes_all_of_its_outputs_or_leaves_them_to_be_copied() -> None:
    rng = np.random.default_rng(1)
    found = [op for op in OPS.values() if (k := NUMBA.kernel(op)) and "into" in inspect.signature(k).parameters]
    assert linear_grad in found
    for op in found:
        for sample in op.samples(rng):
            arrays = [a.astype(np.float32) if a.dtype.kind == "f" else a for a in sample.arrays]
            expected = outputs(NUMBA.run(op, *arrays, **sample.params))
            places = [np.full_like(value, np.nan) for value in expected]
            got = outputs(NUMBA.run(op, *arrays, into=places, **sample.params))
            assert all(a is b for a, b in zip(got, places, strict=True))
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)


def test_a_weights_gradient_is_made_in_its_buffer_and_added_where_there_is_one() -> None:
    places: list[Any] = []

    class Spy(type(NUMBA)):  # type: ignore[misc]
        def _run_into(self, op: Op, arrays: Any, params: Any, *into: Any) -> Any:
            places.append(into[0])
            return super()._run_into(op, arrays, params, *into)

    spy = Spy("numba", NUMBA.xp, "cpu")
    rng = np.random.default_rng(2)
    x = Tensor(rng.standard_normal((5, 4)), spy)
    weight, bias = (Tensor(rng.standard_normal(s), spy, requires_grad=True) for s in ((3, 4), (3,)))
    weight.grad_buffer = np.full((3, 4), np.nan)
    ones = np.ones((5, 3))
    apply(linear, x, weight, bias).backward(ones)
    assert len(places) == 1 and places[0] is weight.grad_buffer is weight.grad
    np.testing.assert_allclose(weight.grad, ones.T @ x.data, rtol=1e-12)
    apply(linear, x, weight, bias).backward(ones)
    assert len(places) == 1 and weight.grad is weight.grad_buffer
    np.testing.assert_allclose(weight.grad, 2 * ones.T @ x.data, rtol=1e-12)


def test_arrays_that_adjoin_are_one() -> None:
    rows = np.arange(40.0).reshape(10, 4)
    a, b, c = flat(rows, 2, 3, 5)
    whole = adjoining([a, b, c])
    assert whole is not None and np.shares_memory(whole, rows)
    np.testing.assert_array_equal(whole, rows)
    np.testing.assert_array_equal(adjoining([b, c]), rows[2:])
    assert adjoining([a, c]) is None and adjoining([b, a]) is None and adjoining([a, None]) is None
    assert adjoining([a, b.copy()]) is None and adjoining([a, b.T]) is None
    joined = NUMBA.run(concatenate, a, b, axis=0)
    assert np.shares_memory(joined, rows)
    np.testing.assert_array_equal(joined, rows[:5])
    assert not np.shares_memory(NUMBA.run(concatenate, a, c, axis=0), rows)


@pytest.mark.parametrize("elsewhere", ["before", "after", "twice", "nowhere"])
def test_a_joined_weight_may_be_used_elsewhere_too(elsewhere: str) -> None:
    """The joint gradient is made in the parts' own buffers: what else comes there must be added, in any order."""
    rng = np.random.default_rng(6)
    values, x = rng.standard_normal((6, 4)), rng.standard_normal((5, 4))

    def gradients(adjoin: bool) -> list[np.ndarray]:
        parts = flat(values.copy(), 2, 4)
        buffers = flat(np.full_like(values, np.nan), 2, 4)
        leaves = [Tensor(p if adjoin else p.copy(), NUMBA, requires_grad=True) for p in parts]
        for leaf, buffer in zip(leaves, buffers, strict=True):
            leaf.grad_buffer = buffer if adjoin else buffer.copy()
        single = (leaves[1] * leaves[1]).sum() if elsewhere == "before" else None
        weight = apply(concatenate, *leaves, axis=0)
        y = apply(linear, Tensor(x, NUMBA), weight, Tensor(np.ones(6), NUMBA))
        loss = (y * y).sum()
        if elsewhere == "twice":
            loss = loss + apply(linear, Tensor(x, NUMBA), weight, Tensor(np.zeros(6), NUMBA)).sum()
        if elsewhere == "after":
            single = (leaves[1] * leaves[1]).sum()
        (loss if single is None else loss + single).backward()
        assert all(leaf.grad is leaf.grad_buffer for leaf in leaves)
        return [leaf.grad.copy() for leaf in leaves]

    for got, expected in zip(gradients(adjoin=True), gradients(adjoin=False), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_of_a_training_step_no_joined_weight_is_a_copy() -> None:
    model, optimiser = model_and_optimiser(NUMBA)
    joined = []

    def watch(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        result = call()
        if op is concatenate:
            joined.append(np.shares_memory(result, optimiser.groups[arrays[0].ndim == 1].param))
        return result

    with NUMBA.watched_by(watch):
        model(IDS, labels=LABELS).loss.backward()
    assert joined and all(joined[::2])


def test_gradients_of_more_passes_are_added_in_place() -> None:
    """Nothing of a weight's size is made for the second, not of one that is joined of three either."""
    model, _ = model_and_optimiser(NUMBA, "float64")
    plain = BertForMaskedLM(SMALL, NUMPY, "float64", seed=5).train()
    weights = [p.grad_buffer for p in model.parameters() if len(p.declared_shape) == 2]
    calls: list[str] = []

    def watch(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        calls.append(op.name)
        assert op is not OPS["add"] or not any(np.shares_memory(arrays[0], w) for w in weights)
        if op is add_linear_grad:
            assert any(np.shares_memory(arrays[0], w) for w in weights)
        return call()

    for one in (model, plain):
        one(IDS, labels=LABELS).loss.backward()
    with NUMBA.watched_by(watch):
        model(IDS, labels=LABELS).loss.backward()
    plain(IDS, labels=LABELS).loss.backward()
    assert calls.count("add_linear_grad") == 4 * SMALL.num_hidden_layers + 2 and "linear_grad" not in calls
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is p.grad_buffer
        np.testing.assert_allclose(p.grad, q.grad, rtol=1e-7, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("passes", [1, 2])
def test_the_tied_table_gets_its_second_gradient_row_by_row(passes: int) -> None:
    """No array of the table's size is made for it, and the sum is that of a model without an optimiser."""
    model, _ = model_and_optimiser(NUMBA, "float64")
    plain = BertForMaskedLM(SMALL, NUMPY, "float64", seed=5).train()
    table = model.bert.embeddings.word_embeddings.weight
    added = []

    def watch(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        if op is add_rows and arrays[0] is table.grad_buffer:
            added.append(arrays[0])
        assert op is not scatter_rows or params["num_rows"] != SMALL.vocab_size
        return call()

    with NUMBA.watched_by(watch):
        for _ in range(passes):
            model(IDS, labels=LABELS).loss.backward()
    for _ in range(passes):
        plain(IDS, labels=LABELS).loss.backward()
    assert len(added) == passes and table.grad is table.grad_buffer
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        np.testing.assert_allclose(p.grad, q.grad, rtol=1e-7, atol=1e-12, err_msg=name)


# --------------------------------------------------------------------------------------------------------- page faults

STEPS = """
import ctypes, json, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: one huge page would hide 512 faults
import numpy as np
from minibert import backends
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.train.optim import AdamW, parameter_groups

backends.get("numba")
if sys.argv[1:] == ["as glibc begins"]:
    for setting, value in ((-4, 1 << 16), (-1, 1 << 17), (-3, 1 << 17)):
        ctypes.CDLL(None).mallopt(setting, value)

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key + ":")).split()[1]) * 1024

config = BertConfig(
    vocab_size=20000, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256
)
model = BertForMaskedLM(config, "numba").train()
optimiser = AdamW(parameter_groups(model, 0.01), max_grad_norm=1.0)
ids = np.random.default_rng(0).integers(0, 20000, (8, 128))

def step():
    loss = model(ids, labels=ids).loss
    loss.item()
    loss.backward()
    optimiser.step()
    optimiser.zero_grad()

for _ in range(4):
    step()
faults, resident = [], status("VmHWM")
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"faults": faults, "grown": status("VmHWM") - resident}))
"""


def step_memory(*arguments: str) -> dict[str, Any]:
    folder = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": folder}
    command = [sys.executable, "-c", STEPS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


GLIBC = sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")


@pytest.mark.skipif(not GLIBC, reason="only glibc can be told to keep freed memory, and only Linux counts it this way")
def test_a_warm_step_makes_no_page_fault_and_takes_no_fresh_memory() -> None:
    """A step's arrays are thousands of pages; a few faults are the interpreter's, or another process's doing.

    By itself glibc learns to keep blocks of up to 32 MB; the step makes one that is larger.
    """
    seen = step_memory()
    assert sorted(seen["faults"])[len(seen["faults"]) // 2] < 50, seen
    assert seen["grown"] < 1 << 20, seen
    untold = step_memory("as glibc begins")  # what is counted here does show
    assert sorted(untold["faults"])[len(untold["faults"]) // 2] > 1000, untold


def test_rows_added_to_a_large_table_are_judged_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces an index would name a row of another piece."""
    monkeypatch.setattr(assess, "JUDGED_PIECE", 8)
    op = OPS["add_rows"]
    arrays, params = next(iter(op.samples(np.random.default_rng(0))))
    inputs = [np.asarray(a, np.float32) if np.asarray(a).dtype.kind == "f" else np.asarray(a) for a in arrays]
    assert inputs[0].size > 8
    got = [x.copy() for x in inputs]
    result = NUMBA.run(op, *got, **params)
    (found,) = assess.assess(op, inputs, params, [list(result)])
    assert not found.wrong
    got[0][-1] += 1
    (found,) = assess.assess(op, inputs, params, [[got[0]]])
    assert found.wrong
