"""Weights that are packed once give the bits of those that are packed in every call, and never those of before."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.kernels.cpu import prepacked
from minibert.kernels.cpu.product import PACKED
from minibert.model.tensor import no_grad

CONFIG = mb.BertConfig(
    vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=100,
    max_position_embeddings=16,
)  # fmt: skip
IDS = np.arange(22).reshape(2, 11)
LAYERS = 2 * 4  # products of weights: Q, K and V as one, their output, up and down


@pytest.fixture(params=["float32", "float64"])
def model(request: pytest.FixtureRequest) -> mb.BertModel:
    return mb.BertModel(CONFIG, "numba", request.param, seed=1)


def found(model: Any) -> np.ndarray:
    with no_grad():
        return np.array(model(IDS, return_dict=True).last_hidden_state.numpy())


def test_the_same_bits(model: mb.BertModel) -> None:
    plain, before = found(model), len(prepacked._kept)
    assert model.prepack() is model
    for _ in range(2):
        assert np.array_equal(found(model), plain)
        assert len(prepacked._kept) - before == LAYERS


def test_kernels_are_given_what_is_packed(model: mb.BertModel) -> None:
    weights = []

    def watch(op: Any, arrays: Any, params: Any, call: Callable[[], Any]) -> Any:
        if op.name.startswith("linear"):
            weights.append(arrays[1])
        return call()

    found(model.prepack())
    with model.backend.watched_by(watch):
        found(model)
    assert [prepacked.transpose_of(weight).row == PACKED for weight in weights] == [True] * LAYERS


WRITES: dict[str, Callable[[mb.BertModel, np.ndarray], Any]] = {
    "assign": lambda model, new: model.encoder.layer[0].attention.self.key.weight.assign(new),
    "data": lambda model, new: setattr(model.encoder.layer[0].attention.self.key.weight, "data", new),
    "load_state_dict": lambda model, new: model.load_state_dict(
        {**model.state_dict(), "encoder.layer.0.attention.self.key.weight": new}
    ),
    "another": lambda model, new: setattr(
        model.encoder.layer[0].attention.self, "key", mb.BertModel(CONFIG, "numba", str(model.dtype), seed=2).encoder
        .layer[0].attention.self.key,
    ),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_is_read(write: str, model: mb.BertModel) -> None:
    before = found(model.prepack())
    new = np.random.default_rng(0).standard_normal((24, 24)).astype(model.dtype)
    WRITES[write](model, new)
    after = found(model)
    assert not np.allclose(after, before)
    plain = mb.BertModel(CONFIG, "numba", str(model.dtype))
    plain.load_state_dict(model.state_dict())
    assert np.array_equal(after, found(plain))


def test_an_update_is_read(model: mb.BertModel) -> None:
    before = found(model.prepack())
    optimizer = mb.train.AdamW(mb.train.parameter_groups(model, 0.0), lr=0.1)
    model(IDS, return_dict=True).last_hidden_state.sum().backward()
    optimizer.step()
    after = found(model)
    assert not np.allclose(after, before)
    plain = mb.BertModel(CONFIG, "numba", str(model.dtype))
    plain.load_state_dict(model.state_dict())
    assert np.array_equal(after, found(plain))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own(copied: Callable[[Any], Any], model: mb.BertModel) -> None:
    before = found(model.prepack())
    other = copied(model)
    other.encoder.layer[0].attention.self.key.weight.assign(np.ones((24, 24)))
    assert np.array_equal(found(model), before)
    assert not np.allclose(found(other), before)


def test_with_a_gradient_nothing_is_kept(model: mb.BertModel) -> None:
    before = len(prepacked._kept)
    found(model.prepack())
    out = model(IDS, return_dict=True).last_hidden_state
    gc.collect()
    assert len(prepacked._kept) == before
    out.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


def test_many_threads_at_one_model(model: mb.BertModel) -> None:
    expected, key = found(model.prepack()), model.encoder.layer[0].attention.self.key.weight
    values = key.numpy().copy()

    def work(number: int) -> np.ndarray:
        if number % 3 == 0:
            key.assign(values)  # the same again: packed anew
        return found(model)

    with ThreadPoolExecutor(8) as pool:
        assert all(np.array_equal(out, expected) for out in pool.map(work, range(120)))


def test_what_is_written_while_it_is_packed_is_not_missed(model: mb.BertModel, monkeypatch: pytest.MonkeyPatch) -> None:
    key, packing = model.encoder.layer[0].attention.self.key.weight, type(model.backend).prepacked

    def written_meanwhile(backend: Any, weight: Any) -> Any:
        packed = packing(backend, weight)
        monkeypatch.undo()  # once
        key.assign(np.ones((24, 24)))
        return packed

    monkeypatch.setattr(type(model.backend), "prepacked", written_meanwhile)
    found(model.prepack())
    plain = mb.BertModel(CONFIG, "numba", str(model.dtype))
    plain.load_state_dict(model.state_dict())
    assert np.array_equal(found(model), found(plain))


def test_it_is_freed_with_the_model() -> None:
    before = len(prepacked._kept)
    model = mb.BertModel(CONFIG, "numba").prepack()
    found(model)
    assert len(prepacked._kept) > before
    del model
    gc.collect()
    assert len(prepacked._kept) == before


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (49, 7), (100, 385), (1000, 769)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("order", ["C", "F", "apart"])
def test_any_product(shape: tuple[int, int], dtype: type, order: str) -> None:
    backend, draw = mb.backends.get("numba"), np.random.default_rng(0).standard_normal
    weight = draw((shape[0], 3 * shape[1])).astype(dtype)[:, ::3] if order == "apart" else draw(shape).astype(dtype)
    weight = np.asfortranarray(weight) if order == "F" else weight
    packed = backend.prepacked(weight)
    assert np.array_equal(packed, weight)
    for rows in (0, 1, 7, 8, 9, 200):
        x, bias = draw((rows, shape[1])).astype(dtype), draw(shape[0]).astype(dtype)
        for op in ("linear", "linear_gelu"):
            got, plain = (backend.run(mb.kernels.OPS[op], x, w, bias) for w in (packed, weight))
            assert all(map(np.array_equal, *((out if isinstance(out, tuple) else (out,)) for out in (got, plain))))
