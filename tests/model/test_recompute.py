"""What a training step keeps for backward, and what backward computes again instead."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minibert.backends import Backend
from minibert.kernels.layer_norm import add_layer_norm
from minibert.kernels.linear import linear, linear_gelu
from minibert.kernels.op import Op
from minibert.kernels.philox import Stream
from minibert.model import bert
from minibert.model.bert import BertForMaskedLM, BertForPreTraining
from minibert.model.config import BertConfig
from minibert.model.packing import in_fixed_shape, pack
from minibert.model.recompute import recomputed
from minibert.model.tensor import Spent, Tensor, apply, current_place, no_grad
from tests.model.test_memory import IDS, LABELS, NUMBA, NUMPY, SMALL, model_and_optimiser

# --------------------------------------------------------------------------------------------------- kept, and dropped


def test_values_that_were_dropped_are_an_error_to_use() -> None:
    x = Tensor(np.ones((2, 3), np.float32), NUMBA)
    x.forget()
    assert (x.shape, x.ndim, x.dtype) == ((2, 3), 2, np.float32)
    with pytest.raises((TypeError, AttributeError, ValueError)):
        x.numpy() + 1


def test_what_can_be_made_again_is_dropped_until_backward_and_freed_by_it() -> None:
    rng = np.random.default_rng(8)
    x, g = (Tensor(rng.standard_normal((5, 4)), NUMPY, requires_grad=True) for _ in range(2))
    weight, bias = (Tensor(rng.standard_normal(shape), NUMPY, requires_grad=True) for shape in ((4, 4), (4,)))
    norm = {"eps": 1e-12, "rate": 0.3, "stream": Stream(1, 2, 3, 4)}

    def gradients(forget: bool) -> list[np.ndarray]:
        for leaf in (x, weight, bias):
            leaf.grad = None
        dense = apply(linear, x, weight, bias)
        first = apply(linear_gelu, dense, weight, bias, approximate="tanh")
        second = apply(add_layer_norm, first, x, bias, bias, **norm)
        third = apply(linear, second, weight, bias) + second
        for step in (x, dense, first, second):
            if forget:
                step.forget_until_backward()
        assert [isinstance(t.data, Spent) for t in (x, dense, first, second)] == [False, False, forget, forget]
        made = weakref.ref(second)
        del first, second, step
        third.backward(g.data)
        assert made() is None
        return [leaf.grad for leaf in (x, weight, bias)]

    for a, b in zip(gradients(forget=True), gradients(forget=False), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("backend", "dtype"), [(NUMPY, "float64"), (NUMBA, "float32")], ids=["numpy", "numba"])
def test_a_model_that_forgets_until_backward_has_the_same_gradients(
    backend: Backend, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    again: list[str] = []

    def watch(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        again.append(op.name)
        return call()

    with backend.watched_by(watch):
        _, gradients = losses_and_gradients(backend, dtype, checkpointing=False)
    passes = 4
    assert again.count("gelu") == passes * SMALL.num_hidden_layers
    assert again.count("layer_norm") == passes * (2 + 2 * SMALL.num_hidden_layers - 1)  # not the last layer's output
    monkeypatch.setattr(Tensor, "forget_until_backward", lambda self: None)
    _, kept = losses_and_gradients(backend, dtype, checkpointing=False)
    for a, b in zip(gradients, kept, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4 if dtype == "float32" else 1e-11, atol=1e-6 * np.abs(b).max())


def test_hidden_states_that_were_asked_for_are_not_forgotten() -> None:
    model, _ = model_and_optimiser(NUMPY)
    for x in model(IDS, labels=LABELS, output_hidden_states=True).hidden_states:
        assert np.isfinite(x.numpy()).all()


# ------------------------------------------------------------------------------------------------------- recomputation


def losses_and_gradients(backend: Backend, dtype: str, checkpointing: bool) -> tuple[list[float], list[np.ndarray]]:
    model, optimiser = model_and_optimiser(backend, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable()
    losses = []
    for _ in range(2):
        optimiser.zero_grad()
        for scale in (0.5, 2.0):  # two passes into one update
            loss = model(IDS, labels=LABELS).loss
            losses.append(loss.item())
            (loss * scale).backward()
        optimiser.step()
    return losses, [backend.numpy(p.grad).copy() for p in model.parameters()]


@pytest.mark.parametrize(("backend", "dtype"), [(NUMPY, "float64"), (NUMBA, "float32")], ids=["numpy", "numba"])
def test_with_recomputation_every_bit_is_the_same(backend: Backend, dtype: str) -> None:
    """Dropout among them: the masks come back."""
    losses, gradients = losses_and_gradients(backend, dtype, checkpointing=False)
    again, same = losses_and_gradients(backend, dtype, checkpointing=True)
    assert losses == again and losses[0] != losses[1]
    for a, b in zip(gradients, same, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A thread of the pool that has not woken yet holds the arrays of its call."""
    before = NUMBA.num_threads()
    NUMBA.set_num_threads(1)
    yield
    NUMBA.set_num_threads(before)


def test_recomputation_keeps_of_each_layer_its_output_alone(one_thread: None) -> None:
    config = BertConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=6, num_attention_heads=1, intermediate_size=128,
        max_position_embeddings=64,
    )  # fmt: skip
    ids = np.ones((16, 64), np.int64)
    unit = ids.size * config.hidden_size * 4

    def units_per_layer(checkpointing: bool) -> float:
        model = BertForMaskedLM(config, NUMBA).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.bert(ids)  # compiled, and what NumPy keeps is there
        with NUMBA.live_memory() as live:
            out = model.bert(ids)
            held = live()
        assert out.last_hidden_state.requires_grad
        return held / unit / config.num_hidden_layers

    assert units_per_layer(checkpointing=True) < 2  # one, and a sixth of what the embeddings keep
    # ten of a layer: q, k and v, what attention gives, both sums with the residual, and four before GELU
    assert 10 < units_per_layer(checkpointing=False) < 11.5


@pytest.fixture
def head_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Of each call of decoder and loss on NumPy, how many rows; the head runs on 2 at a time."""
    monkeypatch.setattr(bert, "HEAD_ROWS", 2)
    rows: list[int] = []

    def watch(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        if op.name == "linear_cross_entropy":
            rows.append(len(arrays[0]))
            assert current_place() == "cls.predictions"
        return call()

    with NUMPY.watched_by(watch):
        yield rows


def gradients_of(model: BertForMaskedLM) -> dict[str, np.ndarray]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("filled", [False, True])
def test_the_head_runs_on_some_rows_at_a_time(filled: bool, head_calls: list[int]) -> None:
    """No more logits than of those exist; loss and gradients are those of the whole, but for the order of sums."""
    packed = pack(SMALL, IDS, labels=LABELS)
    if filled:  # with rows that count for nothing, some of them a part of their own
        packed, _ = in_fixed_shape(packed, 24, 0)
    found = []
    for in_parts in (True, False):
        model, _ = model_and_optimiser(NUMPY, "float64")
        model.head_in_parts = in_parts
        loss = model(packed).loss
        loss.backward(np.asarray(3.0))
        found.append((loss.item(), gradients_of(model)))
    assert packed.predicted is not None
    assert head_calls.pop() == len(packed.predicted) > 4
    assert max(head_calls) == 2 and sum(head_calls) == len(packed.predicted)  # none was computed twice
    (loss, gradients), (whole, expected) = found
    assert loss == pytest.approx(whole, rel=1e-14)
    for name, g in gradients.items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-9, atol=1e-15, err_msg=name)


def test_a_loss_in_parts_that_is_read_first_is_the_same_and_computed_twice(head_calls: list[int]) -> None:
    found, predicted = [], int((LABELS >= 0).sum())
    for read_first in (False, True):
        model, _ = model_and_optimiser(NUMPY, "float64")
        loss = model(IDS, labels=LABELS).loss
        assert (loss.shape, loss.ndim, loss.dtype, loss.requires_grad) == ((), 0, np.float64, True)
        assert head_calls == []
        before = loss.item() if read_first else None
        calls = len(head_calls)
        (loss * 3.0).backward() if read_first else loss.backward(np.asarray(3.0))
        assert len(head_calls) - calls == -(-predicted // 2) and calls == (len(head_calls) // 2 if read_first else 0)
        assert before is None or before == loss.item()
        with pytest.raises(RuntimeError, match="freed"):
            loss.backward()
        found.append((loss.item(), gradients_of(model)))
        head_calls.clear()
    (loss, gradients), (again, same) = found
    assert loss == again
    for name, g in gradients.items():
        np.testing.assert_array_equal(g, same[name], err_msg=name)


def test_a_loss_in_parts_without_gradient_is_computed_at_once(head_calls: list[int]) -> None:
    model, _ = model_and_optimiser(NUMPY, "float64")
    with no_grad():
        loss = model.eval()(IDS, labels=LABELS).loss
    predicted = int((LABELS >= 0).sum())
    assert sum(head_calls) == predicted and max(head_calls) == 2 and not loss.requires_grad
    model.head_in_parts = False
    assert loss.item() == pytest.approx(model(IDS, labels=LABELS).loss.item(), rel=1e-14)
    assert head_calls.pop() == predicted


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_a_next_sentence_loss_the_head_runs_in_parts_for_memory_alone(
    checkpointing: bool, head_calls: list[int]
) -> None:
    both = BertForPreTraining(SMALL, NUMPY, "float64").train()
    if checkpointing:
        both.gradient_checkpointing_enable()
    both(IDS, labels=LABELS, next_sentence_label=np.array([0, 1])).loss.backward()
    predicted = int((LABELS >= 0).sum())
    if checkpointing:
        assert max(head_calls) == 2 and sum(head_calls) == 2 * predicted
    else:
        assert head_calls == [predicted]


def test_a_loss_in_parts_of_a_frozen_model_is_a_number(head_calls: list[int]) -> None:
    model, _ = model_and_optimiser(NUMPY, "float64")
    for p in model.parameters():
        p.requires_grad = False
    frozen = model(IDS, labels=LABELS).loss
    assert not frozen.requires_grad and len(head_calls) > 1
    model.cls.predictions.transform.dense.bias.requires_grad = True
    loss = model(IDS, labels=LABELS).loss
    (loss + frozen).backward()
    assert np.abs(model.cls.predictions.transform.dense.bias.grad).max() > 0
    assert sum(p.grad is not None for p in model.parameters()) == 1


def test_nothing_but_the_loss_holds_what_backward_needs(head_calls: list[int]) -> None:
    model, _ = model_and_optimiser(NUMPY, "float64")
    gc.disable()
    try:
        out = model(IDS, labels=LABELS)
        made = weakref.ref(out._layers[-1])
        del out
        assert made() is None
    finally:
        gc.enable()


def test_a_loss_in_parts_whose_backward_was_interrupted_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert, "HEAD_ROWS", 2)
    calls = []

    def interrupt(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        calls.append(op.name)
        if calls.count("linear_cross_entropy") == 2:
            raise KeyboardInterrupt
        return call()

    model, _ = model_and_optimiser(NUMPY, "float64")
    loss = model(IDS, labels=LABELS).loss
    with NUMPY.watched_by(interrupt), pytest.raises(KeyboardInterrupt):
        loss.backward()
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.item()


def test_recomputation_is_for_training_and_gives_attentions() -> None:
    model, _ = model_and_optimiser(NUMBA)
    model.gradient_checkpointing_enable()
    out = model(IDS, output_attentions=True, labels=LABELS)
    assert len(out.attentions) == SMALL.num_hidden_layers
    model.gradient_checkpointing_disable()
    assert not model.bert.gradient_checkpointing


def test_of_what_needs_no_gradient_nothing_is_computed_again() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return x * 2.0

    x = Tensor(np.ones(3), NUMPY)
    assert not recomputed(double, x).requires_grad
    x.requires_grad = True
    y = recomputed(double, x)
    y.backward(np.ones(3))
    assert len(calls) == 3
    np.testing.assert_array_equal(x.grad, [2, 2, 2])
    with pytest.raises(RuntimeError, match="freed"):
        y.backward(np.ones(3))
