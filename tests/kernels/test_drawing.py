"""Inputs drawn from what an op says of its axes and values: of every size and kind, and the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest

from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.drawing import IGNORED, REGIMES, Drawing, Drawn, axes_of, ladder, small
from minibert.kernels.op import Op, holds_floats, outputs


def drawn(op: Op, number: int, regime: str = "normal", seed: int = 0) -> tuple[tuple[np.ndarray, ...], dict]:
    assert op.draw is not None, f"{op.name} does not say what its arrays hold"
    sizes = small(axes_of(op.draw), number)
    arrays, params = op.draw(Drawing(Drawn(seed, number, sizes, regime)), **sizes)
    return tuple(map(np.asarray, arrays)), dict(params)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_every_op_draws_what_its_formula_takes(op: Op) -> None:
    kinds = [a.dtype.kind for a in next(iter(op.samples(np.random.default_rng(0)))).arrays]
    for number in range(12):
        arrays, params = drawn(op, number)
        assert [a.dtype.kind for a in arrays] == kinds or op.name == "concatenate"
        assert all(np.isfinite(r).all() for r in outputs(op.formula(numpy_module, *arrays, **params)))


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_the_same_seed_draws_the_same_and_another_seed_another(op: Op) -> None:
    first, again, other = (
        b"".join(a.tobytes() for a in drawn(op, 1, seed=seed)[0] if holds_floats(a)) for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("regime", REGIMES)
def test_a_regime_can_be_in_one_array_alone(regime: str) -> None:
    draw = Drawing(Drawn(0, 0, {}, regime, array=1))
    first, second = draw.floats(40, 40), draw.floats(40, 40)
    assert abs(first.mean()) < 0.2 and 0.9 < first.std() < 1.1
    assert regime == "normal" or not np.array_equal(second, Drawing(Drawn(0, 0, {}, "normal")).floats(40, 40))


def test_what_regimes_are_called_is_what_they_hold() -> None:
    def of(regime: str) -> np.ndarray:
        return Drawing(Drawn(0, 0, {}, regime)).floats(30, 50)

    assert (of("about -10000") < -9000).all() and (of("about 10000") > 9000).all()
    assert set(np.unique(of("whole numbers"))) == set(range(-3, 4))
    assert (np.ptp(of("one number in each row"), axis=1) == 0).all()
    assert (np.ptp(of("equal in each row"), axis=1) == 0).all()
    assert ((of("one element that outweighs") > 100).sum(axis=1) == 1).all()
    assert (np.diff(of("rising")) >= 0).all() and (np.diff(of("falling")) <= 0).all()
    assert len(np.unique(of("ties"))) == 3
    zeros = of("zeros")
    assert not zeros.any() and np.signbit(zeros).any() and not np.signbit(zeros).all()
    tiny = np.abs(of("tiny").astype(np.float32))
    assert (tiny < np.finfo(np.float32).tiny).any()


def test_a_ladder_has_what_lies_around_powers_of_two_and_more_than_16_bits_count() -> None:
    rungs = ladder(2**17)
    assert rungs == sorted(set(rungs))
    assert {1, 2, 3, 15, 16, 17, 31, 32, 33, 46, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2049, 4097} <= set(rungs)
    assert {65537, 100003} <= set(rungs) and rungs[-1] == 2**17 + 1
    assert ladder(130)[-1] <= 130 and ladder(7) == [1, 2, 3, 4, 5, 6, 7]


def test_ids_and_labels_and_lengths_of_all_kinds_have_their_turn() -> None:
    ids = [Drawing(Drawn(0, number, {})).ids(40, 7) for number in range(4)]
    assert all(a.min() >= 0 and a.max() < 7 for a in ids)
    assert any(len(set(a)) == 1 for a in ids) and any(set(a) == {0, 6} for a in ids)
    assert any(len(set(Drawing(Drawn(0, number, {})).ids(7, 9))) == 7 for number in range(4))
    kept = [int((Drawing(Drawn(0, number, {})).labels(20, 9) != IGNORED).sum()) for number in range(5)]
    assert {0, 1, 20} <= set(kept) and any(1 < k < 20 for k in kept)
    lengths = [np.diff(Drawing(Drawn(0, number, {})).offsets(6, 40)) for number in range(3)]
    assert all(a.max() == 40 for a in lengths)
    assert any((a == 40).all() for a in lengths) and any(sorted(a)[-2] <= 4 for a in lengths)


def test_choices_have_their_turn_together() -> None:
    seen = set()
    for number in range(6):
        draw = Drawing(Drawn(0, number, {}))
        seen.add((draw.among("a", "b"), draw.among(1, 2, 3)))
    assert len(seen) == 6
