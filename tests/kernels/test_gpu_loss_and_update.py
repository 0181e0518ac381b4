"""CUDA kernels of the loss, of AdamW and of tables, where the samples of their ops do not lead: on the emulator.

Views that begin between two packs, rows on which packs begin elsewhere, bits that do not depend on the grid, runs long
enough to be cut, and indices and labels that no table has.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import Backend, BackendUnavailable
from minibert.kernels import OPS
from minibert.kernels.cross_entropy import IGNORED
from minibert.kernels.embedding.gpu import LONGEST, scatter_plan
from minibert.kernels.op import outputs
from minibert.lab.conform.judge import judge, stored_as

STORED = ("float32", "float16", "bfloat16")
NUMBERS = {"lr": 1e-3, "step": 3, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def emulator() -> Backend:
    try:
        return backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def rounded(name: str, arrays: list[np.ndarray], dtype: str) -> list[np.ndarray]:
    """As the op is given them in that dtype."""
    kinds = stored_as(OPS[name], arrays, dtype)
    return [a if kind is None else a.astype(kind) for a, kind in zip(arrays, kinds, strict=True)]


def off_the_grid(backend: Backend, array: np.ndarray, by: int = 1) -> Any:
    """On the device, contiguous, `by` elements behind a multiple of 16 bytes."""
    longer = np.zeros(array.size + by, array.dtype)
    longer[by:] = array.reshape(-1)
    return backend.asarray(longer)[by:].reshape(array.shape)


def assert_within_bounds(
    backend: Backend, name: str, arrays: list[np.ndarray], given: list[Any], **params: Any
) -> None:
    dtype = next(a.dtype.name for i, a in enumerate(arrays) if i not in OPS[name].wide_inputs)
    results = outputs(backend.run(OPS[name], *given, **params))
    judgement = judge(OPS[name], arrays, params, tuple(backend.numpy(r) for r in results), dtype)
    assert judgement.ok, judgement.problem or judgement.worst


# ---------------------------------------------------------------------------------------------------- cross entropy


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("columns", [3, 67, 9001])
@pytest.mark.parametrize("dtype", STORED)
def test_rows_of_logits_that_begin_on_packs_and_between_them(
    emulator: Backend, rng: np.random.Generator, dtype: str, columns: int, by: int
) -> None:
    """by 0: they lie as their gradient does, so that packs are read from the first whole one on; by 1: they do not."""
    labels = rng.integers(0, columns, 19).astype(np.int32)
    labels[4:7] = IGNORED
    arrays = rounded("cross_entropy", [rng.standard_normal((19, columns)), labels], dtype)
    given = [off_the_grid(emulator, arrays[0], by), emulator.asarray(labels)]
    assert_within_bounds(emulator, "cross_entropy", arrays, given)


def test_labels_that_are_no_column_are_refused(emulator: Backend) -> None:
    logits = emulator.asarray(np.zeros((2, 4), np.float32))
    for labels in ([0, 4], [-1, 0], [-99, 0], [0, 1, 2], [0.0, 1.0]):
        with pytest.raises(ValueError, match="expected"):
            emulator.run(OPS["cross_entropy"], logits, emulator.asarray(np.array(labels)))


# ------------------------------------------------------------------------------------------------------------ AdamW


@pytest.mark.parametrize("dtype", STORED)
def test_adamw_on_a_span_of_flat_arrays_leaves_the_rest_alone(
    emulator: Backend, rng: np.random.Generator, dtype: str
) -> None:
    """The span begins between two packs; to the bit what arrays of their own get."""
    count, span = 1000, slice(5, 994)
    arrays = [rng.standard_normal(count) for _ in range(4)] + [rng.standard_normal(count) ** 2, np.array(0.5)]
    arrays = rounded("adamw_shadow", arrays, dtype)
    flat = [emulator.asarray(a) for a in arrays]
    emulator.run(OPS["adamw_shadow"], *(a[span] if a.ndim else a for a in flat), **NUMBERS)
    alone = [emulator.asarray(a[span] if a.ndim else a) for a in arrays]
    emulator.run(OPS["adamw_shadow"], *alone, **NUMBERS)
    for before, whole, part in zip(arrays[:-1], map(emulator.numpy, flat), map(emulator.numpy, alone), strict=False):
        assert whole[span].tobytes() == part.tobytes()
        assert whole[: span.start].tobytes() == before[: span.start].tobytes()
        assert whole[span.stop :].tobytes() == before[span.stop :].tobytes()


@pytest.mark.parametrize("dtype", STORED)
def test_the_shadow_is_the_parameter_rounded_once(emulator: Backend, rng: np.random.Generator, dtype: str) -> None:
    arrays = [rng.standard_normal(333) for _ in range(4)] + [rng.standard_normal(333) ** 2, np.array(1.0)]
    given = [emulator.asarray(a) for a in rounded("adamw_shadow", arrays, dtype)]
    shadow, param, *_ = map(emulator.numpy, emulator.run(OPS["adamw_shadow"], *given, **NUMBERS))
    assert param.dtype == np.float32
    assert shadow.tobytes() == param.astype(shadow.dtype).tobytes()


@pytest.mark.parametrize("dtype", STORED)
def test_the_bits_of_a_square_norm_do_not_depend_on_the_device(
    emulator: Any, rng: np.random.Generator, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (array,) = rounded("square_norm", [rng.standard_normal(300_001)], dtype)
    found = []
    for multiprocessors in (1, 3):
        monkeypatch.setattr(emulator.driver, "multiprocessors", multiprocessors)
        found.append(emulator.numpy(emulator.run(OPS["square_norm"], emulator.asarray(array))).tobytes())
    assert found[0] == found[1]
    assert_within_bounds(emulator, "square_norm", [array], [off_the_grid(emulator, array)])


# ----------------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize("skip", [None, 0, 2])
@pytest.mark.parametrize(
    "ids",
    [
        np.zeros(0, np.int64),
        np.zeros(7, np.int32),
        np.repeat(np.arange(5), LONGEST + 1),  # as many pieces as there can be
        np.repeat(np.arange(3), [LONGEST, LONGEST + 1, 5 * LONGEST]),
        np.random.default_rng(0).zipf(1.3, 900) % 70_000,
    ],
    ids=["none", "one row", "most pieces", "around the limit", "words"],
)
def test_a_scatter_plan_names_every_row_once(ids: np.ndarray, skip: int | None) -> None:
    rows = 70_000 if ids.size == 900 else 6
    plan = scatter_plan(ids, rows, skip)
    run_of = [list(plan.order[a:b]) for a, b in zip(plan.offsets, plan.offsets[1:], strict=False)]
    assert run_of == [[] if row == skip else list(np.flatnonzero(ids == row)) for row in range(rows)]
    long = {row: len(run) for row, run in enumerate(run_of) if len(run) > LONGEST}
    listed = [(row, first, last) for row, first, last in plan.runs.tolist() if first < last]
    assert [row for row, *_ in listed] == list(long)
    for row, first, last in listed:
        pieces = plan.bounds[first:last]
        assert ((pieces[:, 1] - pieces[:, 0]) <= LONGEST).all()
        assert np.concatenate([plan.order[a:b] for a, b in pieces]).tolist() == run_of[row]


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("columns", [264, 33])
def test_long_runs_are_summed_in_pieces(emulator: Backend, rng: np.random.Generator, dtype: str, columns: int) -> None:
    ids = rng.choice(5, 800, p=[0.4, 0.3, 0.2, 0.1, 0]).astype(np.int32)
    arrays = rounded("scatter_rows", [rng.standard_normal((800, columns)), ids], dtype)
    for skip in (None, 1):
        given = [emulator.asarray(a) for a in arrays]
        assert_within_bounds(emulator, "scatter_rows", arrays, given, num_rows=6, skip=skip)


def test_the_bits_of_a_table_gradient_do_not_depend_on_the_device(
    emulator: Any, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, ids = rng.standard_normal((500, 40)).astype(np.float32), rng.choice(3, 500).astype(np.int32)
    found = []
    for multiprocessors in (1, 3):
        monkeypatch.setattr(emulator.driver, "multiprocessors", multiprocessors)
        y = emulator.run(OPS["scatter_rows"], emulator.asarray(x), emulator.asarray(ids), num_rows=4)
        found.append(emulator.numpy(y).tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("by", [0, 1])
@pytest.mark.parametrize("dtype", STORED)
def test_tables_that_begin_on_packs_and_between_them(
    emulator: Backend, rng: np.random.Generator, dtype: str, by: int
) -> None:
    tables = [rng.standard_normal((n, 40)) for n in (9, 8, 2)]
    ids = [rng.integers(0, n, 21).astype(np.int32) for n in (9, 8, 2)]
    arrays = rounded("embedding", [*tables, *ids], dtype)
    given = [off_the_grid(emulator, a, by) for a in arrays]
    assert_within_bounds(emulator, "embedding", arrays, given)
    assert_within_bounds(emulator, "gather_rows", [arrays[0], ids[0]], [given[0], given[3]], skip=4)
    rows = rounded("scatter_rows", [rng.standard_normal((21, 40)), ids[0]], dtype)
    given = [off_the_grid(emulator, a, by) for a in rows]
    assert_within_bounds(emulator, "scatter_rows", rows, given, num_rows=9)


def test_indices_that_are_no_row_are_refused(emulator: Backend) -> None:
    table = emulator.asarray(np.zeros((4, 2), np.float32))
    good = emulator.asarray(np.array([0, 3], np.int32))
    for bad in (np.array([0, 4], np.int32), np.array([-1, 0])):
        ids = emulator.asarray(bad)
        for op, arrays, params in (
            ("gather_rows", (table, ids), {}),
            ("scatter_rows", (emulator.asarray(np.zeros((2, 2), np.float32)), ids), {"num_rows": 4}),
            ("embedding", (table, table, table, ids, good, good), {}),
        ):
            with pytest.raises(ValueError, match=r"expected numbers from 0 to 3"):
                emulator.run(OPS[op], *arrays, **params)


# ------------------------------------------------------------------------------------------------------------ graphs


def test_a_replayed_graph_takes_other_indices_labels_and_steps(emulator: Any, rng: np.random.Generator) -> None:
    def batch() -> dict[str, np.ndarray]:
        ids, labels = rng.choice(6, 300, p=[0.5, 0.3, 0.2, 0, 0, 0]), rng.integers(0, 9, 40)
        labels[rng.integers(0, 40, 9)] = IGNORED
        return {"ids": rng.permutation(6)[ids].astype(np.int32), "labels": labels.astype(np.int32)}

    rows, logits, *state = (rng.standard_normal(s).astype(np.float32) for s in ((300, 20), (40, 9), 50, 50, 50))
    state.append(rng.standard_normal(50).astype(np.float32) ** 2)
    on_device = [emulator.asarray(a) for a in (rows, logits, *state, np.float32(1))]

    def work(given: dict[str, np.ndarray], step: int) -> list[Any]:
        table = emulator.run(OPS["scatter_rows"], on_device[0], emulator.asarray(given["ids"]), num_rows=6, skip=2)
        loss, dlogits = emulator.run(OPS["cross_entropy"], on_device[1], emulator.asarray(given["labels"]))
        fresh = [a.copy() for a in on_device[2:6]]
        return [table, loss, dlogits, *emulator.run(OPS["adamw"], *fresh, on_device[6], lr=1e-3, step=step)]

    first, second = batch(), batch()
    with emulator.capturing() as capture:
        step = emulator.live_int(1)
        recorded = work(first, step)
    capture.bind(first)
    for given, step.current in ((first, 1), (second, 2), (first, 1)):
        capture.replay(given)
        replayed = [emulator.numpy(r) for r in recorded]
        directly = [emulator.numpy(r) for r in work(given, step.current)]
        assert [r.tobytes() for r in replayed] == [d.tobytes() for d in directly]
