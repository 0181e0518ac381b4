"""Parity with transformers in what a model takes and puts out: masks, labels, embeddings, tuples, torch's tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert import UserError
from tests.model.test_parity import Case, one_thread_for_torch, ours, tensors, theirs

__all__ = ["one_thread_for_torch"]
pytestmark = pytest.mark.parity
CASE = Case(2, 20, (9, 4, 6, 9), layers=2)
BATCH = CASE.batch()
MASKED = BATCH["attention_mask"] * np.array([[1], [1], [0], [1]])  # the third row is padding throughout
KEPT = np.array([True, True, False, True])


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """One model here and in transformers, in float64."""
    reference = theirs(CASE, "BertForPreTraining", "float64")
    mine = ours(CASE, "BertForPreTraining", "numpy", "float64", reference)
    reference.set_attn_implementation(request.param)
    return mine, reference


def assert_alike(mine: Any, other: Any, real: Any = ...) -> None:
    np.testing.assert_allclose(np.asarray(mine)[real], other.detach().numpy()[real], rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["int64", "bool", "float16", "bfloat16", "float64"])
def test_a_mask_of_any_dtype(pair: tuple[Any, Any], dtype: str) -> None:
    import torch

    mine, reference = pair
    ids, mask = (
        torch.from_numpy(BATCH["input_ids"]),
        torch.from_numpy(BATCH["attention_mask"]).to(getattr(torch, dtype)),
    )
    out, other = mine(ids, attention_mask=mask), reference(ids, attention_mask=mask)
    assert_alike(out.logits, other.prediction_logits, BATCH["attention_mask"] == 1)
    assert torch.equal(torch.tensor(out.logits), torch.from_numpy(out.logits.numpy()))


def test_a_row_that_is_masked_throughout(pair: tuple[Any, Any]) -> None:
    """The other rows are transformers'; there that row attends to its padding, here it has no token and is zero."""
    mine, reference = pair
    batch = {"input_ids": BATCH["input_ids"], "attention_mask": MASKED}
    out, other = mine(**batch), reference(**tensors(batch))
    assert_alike(out.logits, other.prediction_logits, MASKED == 1)
    assert_alike(out.seq_relationship_logits, other.seq_relationship_logits, KEPT)
    assert np.isfinite(other.prediction_logits.detach().numpy()).all() and not np.asarray(out.logits)[2].any()


def test_next_sentence_labels_that_do_not_count(pair: tuple[Any, Any]) -> None:
    mine, reference = pair
    batch = {**BATCH, "next_sentence_label": np.array([1, -100, 0, -100])}
    out, other = mine(**batch), reference(**tensors(batch))
    assert out.loss.item() == pytest.approx(other.loss.item(), rel=1e-12)
    for model, loss in ((mine, out.loss), (reference, other.loss)):
        for p in model.parameters():
            p.grad = None
        loss.backward()
    gradients = dict(reference.named_parameters())
    for name in ("cls.seq_relationship.weight", "bert.pooler.dense.weight", "bert.embeddings.word_embeddings.weight"):
        assert_alike(dict(mine.named_parameters())[name].grad, gradients[name].grad)
    none = {**BATCH, "next_sentence_label": np.full(4, -100)}
    assert np.isnan(reference(**tensors(none)).loss.item())  # which would spoil the weights: here it is refused
    with pytest.raises(UserError, match="no sequence has a label that counts"):
        mine(**none)


def test_embeddings_in_place_of_ids_and_their_gradient(pair: tuple[Any, Any]) -> None:
    import torch

    mine, reference = pair
    values = np.random.default_rng(5).standard_normal((*BATCH["input_ids"].shape, 20))
    batch = {name: BATCH[name] for name in BATCH if name != "input_ids"}
    leaf = mb.Tensor(values, mine.backend, requires_grad=True)
    there = torch.from_numpy(values).requires_grad_()
    out, other = mine(inputs_embeds=leaf, **batch), reference(inputs_embeds=there, **tensors(batch))
    assert_alike(out.logits, other.prediction_logits, BATCH["attention_mask"] == 1)
    out.loss.backward()
    other.loss.backward()
    assert_alike(leaf.grad, there.grad)
    looked_up = mine.get_input_embeddings()(BATCH["input_ids"])
    assert_alike(looked_up, reference.get_input_embeddings()(torch.from_numpy(BATCH["input_ids"])))
    with pytest.raises(UserError, match=r"inputs_embeds: .* requires grad"):
        mine(inputs_embeds=there)


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=["plain", "all"])
def test_tuples_and_mappings(architecture: str, asked: dict[str, bool]) -> None:
    """The same names in the same order, by name, number and slice; with and without a loss."""
    reference = theirs(CASE, architecture, "float64")
    mine = ours(CASE, architecture, "numpy", "float64", reference)
    given = [BATCH]
    if architecture != "BertForPreTraining":
        given = [{name: values for name, values in BATCH.items() if name != "next_sentence_label"}]
    if architecture == "BertModel":
        given[0].pop("labels")
    given.append({name: values for name, values in BATCH.items() if "label" not in name})
    for batch in given:
        out, other = mine(**batch, **asked), reference(**tensors(batch), **asked)
        assert [*out] == [name for name in other if name != "cross_attentions"]  # always empty in BERT
        values = mine(**batch, **asked, return_dict=False)
        assert len(values) == len(out) and len(out[:2]) == min(2, len(out))
        for number, name in enumerate(out):
            for value in (out[name], out[number], values[number]):
                if isinstance(other[name], tuple):
                    assert len(value) == len(other[name]) == mine.config.num_hidden_layers + (name == "hidden_states")
                else:
                    pooled = name in ("loss", "pooler_output", "seq_relationship_logits")
                    assert_alike(value, other[name], ... if pooled else BATCH["attention_mask"] == 1)


def test_a_config_that_asks_for_hidden_states(pair: tuple[Any, Any]) -> None:
    """As in scripts that take `outputs[2]` of a model loaded with `output_hidden_states`."""
    import transformers

    there = transformers.BertConfig(**CASE.config(), output_hidden_states=True, output_attentions=True)
    here = mb.BertConfig.from_dict(there.to_dict())
    out = mb.BertModel(here, "numpy")(BATCH["input_ids"])
    other = transformers.BertModel._from_config(there, attn_implementation="eager")(tensors(BATCH)["input_ids"])
    assert len(out[2]) == len(other[2]) == 3 and len(out[3]) == len(other[3]) == 2
    written = transformers.BertConfig(**here.to_dict())
    assert written.output_hidden_states and written.output_attentions
