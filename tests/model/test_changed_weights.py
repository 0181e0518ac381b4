"""What is read after the weights have changed: what was computed before stays, and nothing comes of the new ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from minibert import UserError, backends
from minibert.model import bert
from minibert.model.bert import BertForMaskedLM, BertForPreTraining
from minibert.model.packing import pack
from minibert.model.tensor import tick
from minibert.train.graphed import GraphedSteps
from minibert.train.optim import AdamW
from tests.model.test_memory import IDS, LABELS, NUMPY, SMALL

CHANGED = "the weights have changed since the forward pass"
SENTENCES = np.array([0, 1])


def fresh(**options: Any) -> tuple[BertForPreTraining, Any]:
    """A model of the same weights every time, and its output, from which nothing was read."""
    model = BertForPreTraining(SMALL, NUMPY, seed=5)
    return model, model(IDS, output_hidden_states=True, output_attentions=True, **options)


def step(model: Any) -> None:
    """One of AdamW's on gradients of ones."""
    optimiser = AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = p.data * 0 + 1
    optimiser.step()


def descend_by_hand(model: Any) -> None:
    for p in model.parameters():
        p.data -= 0.1 * (p.data * 0 + 1)


def set_data(model: Any) -> None:
    for p in model.parameters():
        p.data = p.data + 1


def write_through_a_view(model: Any) -> None:
    for p in model.parameters():
        p.data[...] = 0
        p.wrote()


CHANGES = {
    "AdamW": step,
    "load_state_dict": lambda model: model.load_state_dict({n: v + 1 for n, v in model.state_dict().items()}),
    "assign": lambda model: [p.assign(np.zeros(p.shape)) for p in model.parameters()],
    "initialise": lambda model: model.initialise(),
    "p.data -= g": descend_by_hand,
    "p.data = x": set_data,
    "a view, and wrote()": write_through_a_view,
}
READ_LATER: dict[str, Callable[[Any], Any]] = {
    "out.logits": lambda out: out.logits,
    "out.logits, by name": lambda out: out["prediction_logits"],
    "out.logits_at": lambda out: out.logits_at(np.array([1, 2])),
    "out.pooler_output": lambda out: out.pooler_output,
    "out.seq_relationship_logits": lambda out: out.seq_relationship_logits,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", READ_LATER)
def test_what_would_come_of_new_weights_is_refused(name: str, change: str) -> None:
    model, out = fresh()
    CHANGES[change](model)
    with pytest.raises(UserError, match=f"{name.split(',')[0]}|out.pooler_output") as caught:
        READ_LATER[name](out)
    assert CHANGED in str(caught.value) and "\n" not in str(caught.value)
    READ_LATER[name](model(IDS))  # called again, it is the new weights'


def test_what_was_computed_before_stays_as_it_was() -> None:
    (model, out), (_, twin) = fresh(labels=LABELS, next_sentence_label=SENTENCES), fresh()
    seen = {name: read(out).numpy().copy() for name, read in READ_LATER.items() if name != "out.logits_at"}
    loss = out.loss.item()
    step(model)
    for name, values in seen.items():
        np.testing.assert_array_equal(READ_LATER[name](out).numpy(), values)
    assert out.loss.item() == loss
    np.testing.assert_array_equal(out.last_hidden_state.numpy(), twin.last_hidden_state.numpy())
    for mine, other in ((out.hidden_states, twin.hidden_states), (out.attentions, twin.attentions)):
        np.testing.assert_array_equal(np.stack(mine), np.stack(other))


def test_what_does_not_read_the_changed_weights_is_computed_from_what_was() -> None:
    """The encoder's states were kept, so that a change of the encoder alone does no harm to the heads' outputs."""
    (model, out), (_, twin) = fresh(), fresh()
    for p in model.bert.encoder.layer[0].parameters():
        p.assign(np.zeros(p.shape))
    np.testing.assert_array_equal(out.logits.numpy(), twin.logits.numpy())
    np.testing.assert_array_equal(out.seq_relationship_logits.numpy(), twin.seq_relationship_logits.numpy())


def test_an_optimiser_that_moves_the_weights_changes_nothing() -> None:
    (model, out), (_, twin) = fresh(), fresh()
    AdamW(model.parameters())
    np.testing.assert_array_equal(out.logits.numpy(), twin.logits.numpy())


def test_a_parameter_without_a_gradient_is_not_changed_by_a_step() -> None:
    model = BertForPreTraining(SMALL, NUMPY, seed=5)
    optimiser, out = AdamW(model.parameters()), model(IDS, labels=LABELS)
    out.loss.backward()
    optimiser.step()
    assert out.seq_relationship_logits.shape == (2, 2)  # no next-sentence label led there
    with pytest.raises(UserError, match=CHANGED):
        out.logits  # noqa: B018  computed when asked for


@pytest.mark.parametrize("name", ["numba", "emulator"])
def test_the_usual_order_and_a_late_reading_on_other_backends(name: str) -> None:
    reason = next(status.reason for status in backends.available() if status.name == name)
    if reason:
        pytest.skip(reason)
    model = BertForMaskedLM(SMALL, name, seed=5)
    optimiser, out = AdamW(model.parameters(), lr=1e-2), model(IDS, labels=LABELS)
    before = out.loss.item()
    out.loss.backward()
    optimiser.step()
    assert out.loss.item() == before and out[0].numpy() == before
    with pytest.raises(UserError, match=f"out.logits: {CHANGED}"):
        out.logits  # noqa: B018  computed when asked for


def test_a_loss_in_parts_is_that_of_the_weights_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """forward, backward, step, read: as ever. forward, step, read: refused, and so is a late backward."""
    monkeypatch.setattr(bert, "HEAD_ROWS", 2)
    model = BertForMaskedLM(SMALL, NUMPY, seed=5)
    optimiser, loss = AdamW(model.parameters(), lr=1e-2), model(IDS, labels=LABELS).loss
    expected, late = model(IDS, labels=LABELS).loss.item(), model(IDS, labels=LABELS).loss
    loss.backward()
    optimiser.step()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    optimiser.zero_grad()
    for read in (late.item, late.detach, late.numpy, late.backward):
        with pytest.raises(UserError, match=CHANGED):
            read()
    assert all(p.grad is None for p in model.parameters())


def test_a_late_backward_is_refused_before_it_has_begun() -> None:
    """Its gradients would be of the new weights, of what the old ones made: of no function."""
    model = BertForMaskedLM(SMALL, NUMPY, seed=5)
    optimiser = AdamW(model.parameters(), lr=1e-2)
    first, second = model(IDS, labels=LABELS).loss, model(IDS[:, ::-1], labels=LABELS).loss
    first.backward()
    optimiser.step()
    optimiser.zero_grad()
    with pytest.raises(UserError, match=f"backward: {CHANGED}"):
        (second * 2).backward()
    assert all(p.grad is None for p in model.parameters())
    model(IDS, labels=LABELS).loss.backward()


def test_a_late_backward_that_computes_a_layer_again_is_refused_too() -> None:
    model = BertForMaskedLM(SMALL, NUMPY, seed=5).train()
    model.gradient_checkpointing_enable()
    loss = model(IDS, labels=LABELS).loss
    model.bert.encoder.layer[0].output.dense.bias.assign(np.zeros(SMALL.hidden_size))
    with pytest.raises(UserError, match=f"backward: {CHANGED}"):
        loss.backward()


def test_a_replayed_step_changes_the_weights_too() -> None:
    reason = next(status.reason for status in backends.available() if status.name == "emulator")
    if reason:
        pytest.skip(reason)
    model = BertForMaskedLM(SMALL, "emulator", seed=5).train()
    optimiser = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    steps, packed = GraphedSteps(model, optimiser, 64), pack(SMALL, IDS, labels=LABELS)
    for number in range(3):
        out = model.eval()(IDS)
        model.train()
        _, square_norm, recorded = steps.gradients(packed, number)
        optimiser.check_norm(square_norm)
        steps.update(recorded, square_norm)
        with pytest.raises(UserError, match=CHANGED):
            out.logits  # noqa: B018  computed when asked for
    assert steps.replays == 2


def put_in_a_pooler(model: Any, older: Any) -> None:
    model.bert.pooler = older.bert.pooler


def put_in_a_bias(model: Any, older: Any) -> None:
    model.cls.predictions.bias = older.cls.predictions.bias


def put_in_embeddings(model: Any, older: Any) -> None:
    model.bert.embeddings = older.bert.embeddings


def put_in_a_transform(model: Any, older: Any) -> None:
    model.cls.predictions.transform.dense = older.cls.predictions.transform.dense


def put_in_a_head(model: Any, older: Any) -> None:
    model.cls.seq_relationship.weight = older.cls.seq_relationship.weight


@pytest.mark.parametrize(
    "put_in", [put_in_a_pooler, put_in_a_bias, put_in_embeddings, put_in_a_transform, put_in_a_head]
)
def test_what_is_put_in_place_of_weights_later_changes_no_output(put_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As weights are shared with another model, which may be older than the output."""
    monkeypatch.setattr(bert, "HEAD_ROWS", 2)
    older, twin = BertForPreTraining(SMALL, NUMPY, seed=9), fresh(labels=LABELS)[1]
    for p in older.parameters():
        p.assign(np.full(p.shape, 0.5))
    model, out = fresh(labels=LABELS)
    put_in(model, older)
    for name, read in READ_LATER.items():
        np.testing.assert_array_equal(read(out).numpy(), read(twin).numpy(), err_msg=name)
    assert out.loss.item() == twin.loss.item()
    assert any((read(model(IDS)).numpy() != read(twin).numpy()).any() for read in READ_LATER.values())


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
}


@pytest.mark.parametrize("name", ["numpy", "numba", "emulator"])
@pytest.mark.parametrize("made", COPIES)
def test_a_copy_is_of_the_same_values_and_no_write(made: str, name: str) -> None:
    reason = next(status.reason for status in backends.available() if status.name == name)
    if reason:
        pytest.skip(reason)
    model = BertForPreTraining(SMALL, name, seed=5)
    out = model(IDS, labels=LABELS, output_hidden_states=True)
    twin, copied = COPIES[made](model), COPIES[made](out)
    assert twin.backend is model.backend
    for read in READ_LATER.values():
        expected = read(out).numpy()
        np.testing.assert_array_equal(read(twin(IDS)).numpy(), expected)
        np.testing.assert_array_equal(read(copied).numpy(), expected)
    assert copied.loss.item() == out.loss.item()
    twin(IDS, labels=LABELS).loss.backward()
    twin.cls.predictions.bias.assign(np.ones(SMALL.vocab_size))
    np.testing.assert_array_equal(model(IDS).logits.numpy(), out.logits.numpy())  # nothing is shared
    with pytest.raises(UserError, match=CHANGED):
        late = COPIES[made](twin(IDS))
        late._word_embeddings.weight.assign(np.ones((SMALL.vocab_size, SMALL.hidden_size)))
        late.logits  # noqa: B018  computed when asked for


def test_a_copy_of_a_loss_in_parts_is_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert, "HEAD_ROWS", 2)
    loss = BertForMaskedLM(SMALL, NUMPY, seed=5)(IDS, labels=LABELS).loss
    assert [make(loss).item() for make in COPIES.values()] == [loss.item()] * 2


def test_what_another_process_pickled_is_older_than_what_is_written_here() -> None:
    model = BertForMaskedLM(SMALL, NUMPY, seed=5)
    out, now = model(IDS), tick()
    out._made_at = now + 1000  # as of a process that ran longer
    loaded = COPIES["pickle"](out)
    loaded.heads.predictions.bias.assign(np.ones(SMALL.vocab_size))
    with pytest.raises(UserError, match=CHANGED):
        loaded.logits  # noqa: B018  computed when asked for


@pytest.mark.parametrize("arguments", [{}, {"cu_seqlens": [0, 11, 22]}], ids=["padded", "packed"])
def test_who_writes_over_what_came_out_changes_nothing_else(arguments: Any) -> None:
    model, ids = BertForPreTraining(SMALL, NUMPY, seed=5), IDS.reshape(-1) if arguments else IDS
    out, twin = (model(ids, output_hidden_states=True, **arguments) for _ in range(2))
    for state in (*out.hidden_states, model.bert(ids, **arguments).last_hidden_state):
        values = np.asarray(state)
        values *= 0
    for name, read in READ_LATER.items():
        np.testing.assert_array_equal(read(out).numpy(), read(twin).numpy(), err_msg=name)
    twin.hidden_states[-1].sum().backward()  # and a gradient goes through
    assert model.bert.encoder.layer[0].output.dense.weight.grad is not None


def test_the_values_of_a_parameter_are_to_read_where_no_write_would_be_seen() -> None:
    model, out = fresh()
    bias = model.cls.predictions.bias
    for values in (bias.numpy(), np.asarray(bias)):
        with pytest.raises(ValueError, match="read-only"):
            values[...] = 1
    np.array(bias)[...] = 1  # a copy
    np.testing.assert_array_equal(out.logits.numpy(), fresh()[1].logits.numpy())
    bias.data[...] = 0  # the way in remains
