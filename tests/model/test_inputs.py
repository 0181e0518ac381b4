"""What a model takes and puts out: every shape and dtype that scripts give, and one line about all others."""

from __future__ import annotations

import re
from collections import UserDict
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert import UserError, backends
from minibert.kernels.cross_entropy import cross_entropy
from minibert.model.bert import BertForMaskedLM, BertForPreTraining, BertModel
from minibert.model.packing import pack
from minibert.model.tensor import Tensor, apply, no_grad
from tests.model.test_memory import NUMPY, SMALL

RNG = np.random.default_rng(0)
IDS = RNG.integers(1, SMALL.vocab_size, (4, 6))
FLAT = IDS.reshape(-1)
MASK = np.array([[1] * 6, [1, 1, 1, 1, 0, 0], [1] * 6, [0, 1, 1, 1, 1, 1]])
SENTENCES = np.array([0, 1, 1, 0])
QUIET = replace(SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

model = BertForPreTraining(QUIET, NUMPY, "float64", seed=2)
headed, encoder = BertForMaskedLM(QUIET, NUMPY, "float64", seed=2), BertModel(QUIET, NUMPY, "float64", seed=2)
expected = encoder(IDS, MASK).last_hidden_state.numpy()

# ------------------------------------------------------------------------------------------------------------- refused


def beside(**more: Any) -> dict[str, Any]:
    return {"input_ids": IDS, **more}


def packed(**more: Any) -> dict[str, Any]:
    return {"input_ids": FLAT, **more}


REFUSED = {
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids: .* got \(6,\); of one sequence alone make a batch: \[ids\]"),
    "three dimensions": ({"input_ids": IDS[None]}, r"input_ids: expected shape \(B, T\).* got \(1, 4, 6\)"),
    "float ids": ({"input_ids": IDS * 1.0}, "input_ids: expected an array of integers, got float64"),
    "bool ids": ({"input_ids": IDS > 0}, "input_ids: expected an array of integers, got bool"),
    "negative ids": ({"input_ids": -IDS}, r"input_ids: -\d+ is out of range; expected 0 .. 60"),
    "large ids": ({"input_ids": IDS + 60}, r"input_ids: \d+ is out of range; .* \(vocab_size\)"),
    "an id past int64": ({"input_ids": np.full((2, 2), 2**64 - 1, np.uint64)}, "input_ids: .* is out of range"),
    "an id just past int64": ({"input_ids": np.full((2, 2), 2**63, np.uint64)}, f"input_ids: {2**63} is out of range"),
    "complex ids": ({"input_ids": IDS * 1j}, "input_ids: expected an array of integers, got ndarray of complex128"),
    "a complex mask": (beside(attention_mask=MASK * 1j), "attention_mask: .* got ndarray of complex128"),
    "complex embeddings": ({"inputs_embeds": expected * 1j}, "inputs_embeds: .* got ndarray of complex128"),
    "no ids": ({"input_ids": np.zeros((2, 0), int)}, r"input_ids: .* an empty one of shape \(2, 0\)"),
    "text": ({"input_ids": "some text"}, "input_ids: .* a tokenizer makes ids of text"),
    "tokens": ({"input_ids": [["[CLS]", "the"]]}, "input_ids: .* a tokenizer makes ids of text"),
    "None among ids": ({"input_ids": [[1, None]]}, "input_ids: expected an array of integers, got list of object"),
    "ragged ids": ({"input_ids": [[1, 2], [3]]}, "input_ids: .* inhomogeneous"),
    "a batch that was not unpacked": ({"input_ids": {"input_ids": IDS}}, r"unpack it: model\(\*\*batch\)"),
    "nor this one": ({"input_ids": UserDict(input_ids=IDS)}, r"got a UserDict; unpack it: model\(\*\*batch\)"),
    "nothing": ({}, "expected input_ids or inputs_embeds, one of the two"),
    "both": (beside(inputs_embeds=expected), "expected input_ids or inputs_embeds, one of the two"),
    "too long": (
        {"input_ids": np.ones((2, 13), int)},
        r"input_ids: a sequence of 13 tokens is too long: .* 12 \(max_position_embeddings\)",
    ),
    "too long, packed": (packed(cu_seqlens=[0, 3, 24]), "input_ids: a sequence of 21 tokens is too long"),
    "too long, embedded": ({"inputs_embeds": np.ones((1, 14, 16))}, "inputs_embeds: a sequence of 14 tokens is"),
    "positions": (beside(position_ids=np.arange(6) + 7), "position_ids: 12 is out of range"),
    "positions of another shape": (beside(position_ids=np.arange(5)), r"position_ids: .* got \(5,\)"),
    "types": (beside(token_type_ids=IDS), "token_type_ids: .* token types"),
    "types of another shape": (beside(token_type_ids=MASK[:2]), r"token_type_ids: .* got \(2, 6\)"),
    "float types": (beside(token_type_ids=MASK * 0.5), "token_type_ids: .* float64"),
    "mask of another shape": (beside(attention_mask=MASK[:, :5]), r"attention_mask: .* got \(4, 5\)"),
    "mask of two rows": (beside(attention_mask=MASK[:2]), r"attention_mask: .* got \(2, 6\)"),
    "additive mask beside scores": (
        beside(attention_mask=(MASK[:, None, None] - 1) * 1e4),
        "attention_mask: expected 1 .* got -10000.0; of a mask that is added to scores give mask == 0",
    ),
    "mask of pairs": (beside(attention_mask=np.ones((4, 1, 6, 6))), "attention_mask: .* not for each pair"),
    "additive mask": (
        beside(attention_mask=(1 - MASK) * -10000),
        "attention_mask: expected 1 .* got -10000; of a mask that is added to scores give mask == 0",
    ),
    "additive mask, infinite": (beside(attention_mask=np.where(MASK, 0, -np.inf)), "got -inf; .* give mask == 0"),
    "mask of 2": (beside(attention_mask=MASK * 2), "attention_mask: expected 1 .* got 2$"),
    "mask of 0.5": (beside(attention_mask=MASK * 0.5), "attention_mask: expected 1 .* got 0.5$"),
    "mask of nan": (beside(attention_mask=MASK * np.nan), "attention_mask: expected 1 .* got nan$"),
    "mask of text": (beside(attention_mask=[["1"] * 6] * 4), "attention_mask: expected an array of 0 and 1"),
    "all masked": (beside(attention_mask=MASK * 0), "attention_mask: every token is masked"),
    "a mask of what is packed": (
        packed(cu_seqlens=[0, 12, 24], attention_mask=np.ones(24)),
        "attention_mask: .* leave it out",
    ),
    "labels of another shape": (beside(labels=IDS[0]), r"labels: .* got \(6,\)"),
    "labels past the vocabulary": (beside(labels=IDS + 60), "labels: .* or -100 where nothing"),
    "labels of -1": (beside(labels=IDS * 0 - 1), "labels: -1 is out of range"),
    "no label": (beside(labels=IDS * 0 - 100), "labels: expected at least one position"),
    "float labels": (beside(labels=IDS * 1.0), "labels: .* float64"),
    "sentence labels of 2": (beside(next_sentence_label=SENTENCES + 1), "next_sentence_label: 2 is out"),
    "sentence labels of -1": (beside(next_sentence_label=-SENTENCES), "next_sentence_label: -1 is out"),
    "too few": (beside(next_sentence_label=[0]), r"one for each of 4 sequences, got shape \(1,\)"),
    "no sentence label": (
        beside(next_sentence_label=[-100] * 4),
        "next_sentence_label: .* no sequence has a label that counts",
    ),
    "offsets of floats": (packed(cu_seqlens=[0.0, 24.0]), "cu_seqlens: .* got float64"),
    "offsets that end early": (packed(cu_seqlens=[0, 5, 20]), r"cu_seqlens: .* got \[0, 5, 20\] of"),
    "offsets that begin late": (packed(cu_seqlens=[1, 24]), "cu_seqlens: expected growing offsets"),
    "offsets that fall": (packed(cu_seqlens=[0, 9, 5, 24]), "cu_seqlens: expected growing offsets"),
    "offsets that stay": (packed(cu_seqlens=[0, 9, 9, 24]), "cu_seqlens: expected growing offsets"),
    "two rows of offsets": (packed(cu_seqlens=[[0, 24]] * 2), r"of shape \(2, 2\) for input_ids"),
    "one offset": (packed(cu_seqlens=24), r"cu_seqlens: .* of shape \(\) for"),
    "offsets for padded ids": (beside(cu_seqlens=[0, 24]), r"for input_ids of shape \(4, 6\)"),
    "many offsets": (packed(cu_seqlens=np.arange(3000)), r"\[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\]"),
    "embeddings of one sequence": ({"inputs_embeds": expected[0]}, r"inputs_embeds: .* got \(6, 16\)"),
    "embeddings of another width": ({"inputs_embeds": expected[..., :5]}, r"inputs_embeds: .* got \(4, 6, 5\)"),
    "embeddings of another dtype": (
        {"inputs_embeds": Tensor(expected.astype(np.float32), NUMPY)},
        "inputs_embeds: expected float64 on numpy, got Tensor",
    ),
    "embeddings from elsewhere": (
        {"inputs_embeds": Tensor(expected, backends.get("numba"))},
        "inputs_embeds: expected float64 on numpy, got Tensor",
    ),
    "a packed batch and more": ({"input_ids": pack(QUIET, IDS), "attention_mask": MASK}, "give it alone"),
    "a misspelt name": (beside(token_types_id=MASK), "token_types_id: .* did you mean token_type_ids?"),
    "an unknown name": (beside(temperature=1.0), "temperature: unknown argument; expected some of input_ids"),
    "head_mask": (beside(head_mask=MASK), "head_mask: .* attention.output.dense.weight"),
    "past_key_values": (beside(past_key_values=((),)), "past_key_values: .* no cache; leave it out"),
    "use_cache": (beside(use_cache=True), "use_cache: .* no cache; leave it out"),
    "encoder_hidden_states": (beside(encoder_hidden_states=expected), "encoder_hidden_states: .* encoder"),
    "masked_lm_labels": (beside(masked_lm_labels=IDS), "masked_lm_labels: its name is labels"),
    "special_tokens_mask": (beside(special_tokens_mask=MASK), "special_tokens_mask: .* leave it out"),
}


def test_a_mask_for_all_rows_or_beside_scores_and_flat_labels_are_taken() -> None:
    one_row = np.array([[1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(
        encoder(IDS, one_row).last_hidden_state.numpy(),
        encoder(IDS, np.repeat(one_row, 4, 0)).last_hidden_state.numpy(),
    )
    np.testing.assert_array_equal(encoder(IDS, MASK[:, None, None]).last_hidden_state.numpy(), expected)
    labels = np.where(MASK, IDS, -100)
    assert headed(IDS, MASK, labels=labels.reshape(-1)).loss.item() == headed(IDS, MASK, labels=labels).loss.item()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_in_one_line(name: str) -> None:
    arguments, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        model(**arguments)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("of", "name", "message"),
    [
        (encoder, "labels", "labels: BertModel has no head that predicts; use BertForMaskedLM"),
        (encoder, "next_sentence_label", "use BertForPreTraining"),
        (headed, "next_sentence_label", "next_sentence_label: this model has no next-sentence head"),
    ],
)
def test_a_model_without_the_head_says_which_has_it(of: Any, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of(IDS, **{name: SENTENCES})
    assert of(IDS, **{name: None})[0].shape[:2] == (4, 6)


def test_a_message_about_a_large_value_is_short() -> None:
    for wrong in ({"backend": {"weights": IDS}}, {"dtype": "x" * 5000}, {"seed": IDS}):
        with pytest.raises(UserError) as caught:
            BertModel(QUIET, **{"backend": NUMPY, **wrong})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


# --------------------------------------------------------------------------------------------------------------- taken


@pytest.mark.parametrize(
    "dtype", [bool, np.int8, np.uint8, np.int32, np.int64, np.uint64, np.float16, np.float32, np.float64]
)
def test_a_mask_of_0_and_1_is_taken_in_any_dtype(dtype: Any) -> None:
    np.testing.assert_array_equal(encoder(IDS, MASK.astype(dtype)).last_hidden_state.numpy(), expected)
    np.testing.assert_array_equal(encoder(IDS, MASK.astype(dtype).tolist()).last_hidden_state.numpy(), expected)


def test_what_is_padding_is_not_looked_at() -> None:
    ids, labels = np.where(MASK == 1, IDS, -1), np.where(MASK == 1, IDS, 10**6)
    np.testing.assert_array_equal(encoder(ids, MASK).last_hidden_state.numpy(), expected)
    assert headed(ids, MASK, labels=labels).loss.item() == headed(IDS, MASK, labels=IDS).loss.item()
    long = np.pad(IDS, ((0, 0), (0, 20)))
    out = encoder(long, np.pad(MASK, ((0, 0), (0, 20)))).last_hidden_state.numpy()
    np.testing.assert_array_equal(out[:, :6], expected)
    assert not out[:, 6:].any()


@pytest.mark.parametrize("row", [np.arange(6)[::-1], np.arange(6)[::-1][None]], ids=["(T,)", "(1, T)"])
def test_positions_and_types_may_be_one_row_for_all(row: np.ndarray) -> None:
    whole = np.broadcast_to(row, IDS.shape)
    for given, alike in (({"position_ids": row}, {"position_ids": whole}),
                         ({"token_type_ids": row % 2}, {"token_type_ids": whole % 2})):  # fmt: skip
        a, b = (encoder(IDS, MASK, **arguments).last_hidden_state.numpy() for arguments in (given, alike))
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - expected).max() > 1e-3


@pytest.mark.parametrize("name", ["numpy", "numba", "emulator"])
def test_a_row_that_is_masked_throughout_changes_no_other_and_is_zero(name: str) -> None:
    reason = next(status.reason for status in backends.available() if status.name == name)
    if reason:
        pytest.skip(reason)
    bert = BertForPreTraining(QUIET, name, seed=2)
    empty = np.array([0, 2, 5])
    ids, mask, labels = (np.insert(a, [0, 1, 3], a[:3], axis=0) for a in (IDS, MASK, np.where(MASK == 1, IDS, -100)))
    mask[empty] = 0
    kept = np.delete(np.arange(7), empty)
    sentences = np.array([1, 0, 0, 1, 1, 1, 0])
    alone = bert(IDS, MASK, labels=labels[kept], next_sentence_label=sentences[kept])
    out = bert(ids, mask, labels=labels, next_sentence_label=sentences)
    assert out.loss.item() == alone.loss.item()
    for found, other in (
        (out.last_hidden_state, alone.last_hidden_state), (out.logits, alone.logits),
        (out.pooler_output, alone.pooler_output),
    ):  # fmt: skip
        np.testing.assert_array_equal(found.numpy()[kept], other.numpy())
        assert not found.numpy()[empty].any()
    np.testing.assert_array_equal(out.seq_relationship_logits.numpy()[kept], alone.seq_relationship_logits.numpy())
    alone.loss.backward()
    gradients = {n: np.array(bert.backend.numpy(p.grad)) for n, p in bert.named_parameters()}
    for p in bert.parameters():
        p.grad = None
    out.loss.backward()
    for n, p in bert.named_parameters():
        np.testing.assert_allclose(bert.backend.numpy(p.grad), gradients[n], rtol=0, atol=1e-7, err_msg=n)


def test_a_next_sentence_label_of_minus_100_does_not_count() -> None:
    some = model(IDS, next_sentence_label=[0, -100, 1, -100]).loss
    assert some.item() == pytest.approx(model(IDS[[0, 2]], next_sentence_label=[0, 1]).loss.item(), rel=1e-14)
    both = model(IDS, labels=IDS, next_sentence_label=np.array([[0], [-100], [1], [-100]])).loss
    assert both.item() == pytest.approx(some.item() + model(IDS, labels=IDS).loss.item(), rel=1e-14)


def test_embeddings_stand_in_place_of_ids() -> None:
    words = encoder.get_input_embeddings()(IDS)
    assert words.shape == (4, 6, 16) and model.get_input_embeddings() is model.bert.embeddings.word_embeddings
    for given in (words, words.numpy(), words.tolist()):
        np.testing.assert_array_equal(
            encoder(inputs_embeds=given, attention_mask=MASK).last_hidden_state.numpy(), expected
        )
    packed = encoder(inputs_embeds=words.reshape(24, 16), cu_seqlens=[0, 12, 24]).last_hidden_state
    np.testing.assert_array_equal(packed.numpy(), encoder(FLAT, cu_seqlens=[0, 12, 24]).last_hidden_state.numpy())
    with pytest.raises(UserError, match="ids: 61 is out of range"):
        encoder.get_input_embeddings()([61])


def test_the_gradient_of_embeddings_given_and_of_those_looked_up_is_that_of_ids() -> None:
    """The padding's row gets none, though its id is among the real ones."""
    ids = IDS.copy()
    ids[0, 1] = QUIET.pad_token_id
    weight, gradients = headed.bert.embeddings.word_embeddings.weight, []
    for given in ({"input_ids": ids}, {"inputs_embeds": headed.get_input_embeddings()(ids)}):
        for p in headed.parameters():
            p.grad = None
        headed(**given, attention_mask=MASK, labels=IDS).loss.backward()
        gradients.append({n: p.grad.copy() for n, p in headed.named_parameters()})
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], gradient, rtol=0, atol=1e-15, err_msg=name)
    leaf = Tensor(weight.numpy()[ids], NUMPY, requires_grad=True)
    headed(inputs_embeds=leaf, attention_mask=MASK, labels=IDS).loss.backward()
    assert leaf.grad is not None and not leaf.grad[MASK == 0].any()
    direction, step = RNG.standard_normal(leaf.shape), 1e-6
    with no_grad():
        ahead, behind = (
            headed(inputs_embeds=leaf.numpy() + s * direction, attention_mask=MASK, labels=IDS).loss.item()
            for s in (step, -step)
        )
    assert (leaf.grad * direction).sum() == pytest.approx((ahead - behind) / (2 * step), rel=1e-6)


# ------------------------------------------------------------------------------------------------------------- put out


def test_an_output_is_a_mapping_and_a_tuple_as_in_transformers() -> None:
    out = headed(IDS, MASK, labels=IDS, output_hidden_states=True)
    assert [*out] == [*out.keys()] == ["loss", "logits", "hidden_states"] and len(out) == 3
    assert out["loss"] is out[0] is out.loss and out[1] is out["logits"] is out.logits and out[-1] is out.hidden_states
    loss, logits = out[:2]
    assert loss is out.loss and logits is out.logits and out.to_tuple() == out[:]
    assert "logits" in out and "attentions" not in out and out.get("attentions") is None and bool(out)
    assert dict(out)["logits"] is dict(**out)["logits"] is out.logits
    assert out != headed(IDS, MASK) and len({out, out}) == 1
    with pytest.raises(KeyError, match="pooler_output: this output has loss, logits, hidden_states"):
        out["pooler_output"]
    with pytest.raises(IndexError):
        out[3]


def test_a_name_or_another_value_computes_no_logits() -> None:
    out = headed(IDS, labels=IDS)
    assert len(out) == 2 and "logits" in out and out[0] is out.loss and "logits" not in vars(out)


@pytest.mark.parametrize(
    ("of", "arguments", "names"),
    [
        (encoder, {}, ["last_hidden_state", "pooler_output"]),
        (encoder, {"output_hidden_states": True, "output_attentions": True},
         ["last_hidden_state", "pooler_output", "hidden_states", "attentions"]),
        (BertModel(QUIET, NUMPY, add_pooling_layer=False), {}, ["last_hidden_state"]),
        (headed, {}, ["logits"]),
        (headed, {"labels": IDS, "output_attentions": True}, ["loss", "logits", "attentions"]),
        (model, {}, ["prediction_logits", "seq_relationship_logits"]),
        (model, {"next_sentence_label": SENTENCES}, ["loss", "prediction_logits", "seq_relationship_logits"]),
    ],
)  # fmt: skip
def test_return_dict_false_gives_all_of_it_as_a_tuple(of: Any, arguments: Any, names: list[str]) -> None:
    out, values = of(IDS, **arguments, return_dict=True), of.forward(IDS, **arguments, return_dict=False)
    assert [*out] == names and type(values) is tuple and len(values) == len(names)
    for name, value in zip(names, values, strict=True):
        np.testing.assert_array_equal(np.asarray(value), np.asarray(out[name]))


def test_what_the_config_puts_out_where_the_call_does_not_say() -> None:
    config = mb.BertConfig.from_dict({**QUIET.to_dict(), "output_hidden_states": True, "output_attentions": True})
    assert config.to_dict()["output_hidden_states"] is True and "output_hidden_states" not in QUIET.to_dict()
    for bert in (BertModel(config, NUMPY), BertForMaskedLM(config, NUMPY)):
        out = bert(IDS)
        assert len(out.hidden_states) == 4 and len(out.attentions) == 3
        out = bert(IDS, output_hidden_states=False, output_attentions=False)
        assert out.hidden_states is None and out.attentions is None


def test_a_config_without_return_dict_gives_tuples_where_the_call_does_not_say() -> None:
    config = mb.BertConfig.from_dict({**QUIET.to_dict(), "return_dict": False})
    assert config.to_dict()["return_dict"] is False and "return_dict" not in QUIET.to_dict()
    last_hidden_state, pooled = BertModel(config, NUMPY, "float64", seed=2)(IDS, MASK)
    np.testing.assert_array_equal(last_hidden_state.numpy(), expected)
    assert pooled.shape == (4, 16)
    for bert in (BertForMaskedLM(config, NUMPY), BertForPreTraining(config, NUMPY)):
        loss, logits, *_ = bert(IDS, labels=IDS)
        loss.backward()
        assert loss.shape == () and logits.shape == (4, 6, 61) and bert(IDS, return_dict=True).logits is not None


def test_a_model_without_a_pooler_has_no_pooler_output() -> None:
    out = BertModel(QUIET, NUMPY, add_pooling_layer=False)(IDS)
    assert out.pooler_output is None and "pooler_output" not in out


def test_a_loss_of_one_s_own_on_a_part_of_an_output() -> None:
    """A token's state by index, a dense layer, cross entropy, their weighed sum: the gradient worked out by hand."""
    weight = Tensor(RNG.standard_normal((16, 2)), NUMPY, requires_grad=True)
    out = encoder(IDS, MASK)
    loss = apply(cross_entropy, out[0][:, 1] @ weight, Tensor(SENTENCES, NUMPY))
    (loss / 4 + loss * 0.75).backward()
    logits = expected[:, 1] @ weight.numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(weight.grad, expected[:, 1].T @ (p - np.eye(2)[SENTENCES]) / 4, rtol=1e-12)
    assert re.fullmatch(r"\d\.\d{4}", f"{loss:.4f}")
