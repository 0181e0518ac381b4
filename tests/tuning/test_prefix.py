"""Prefix tuning: what a token attends to, which positions it has, what is trained, and files whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minibert as mb
from minibert.model.tensor import no_grad
from minibert.tuning import PrefixTuningConfig, PrefixTuningModel, get_peft_model, load_peft_model
from tests.small_model import CONFIG, IDS, LABELS, QUIET, logits, masked_lm

CLASSES = np.array([1, 0, 1])
FOR_TEXTS = PrefixTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")


def classifier(config: mb.BertConfig = CONFIG, seed: int = 3, **more: Any) -> Any:
    return mb.BertForSequenceClassification(config, seed=seed, **more)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_token_attends_to_the_prefix_and_to_its_sequence(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer's attention by the textbook, on sequences of unequal length; and positions that begin behind it."""
    model = get_peft_model(mb.BertModel(replace(QUIET, num_hidden_layers=1), backend, seed=3),
                           PrefixTuningConfig(num_virtual_tokens=5))  # fmt: skip
    plain = mb.BertModel(replace(QUIET, num_hidden_layers=1), backend, seed=3)
    mask = np.array([[1] * 11, [1] * 4 + [0] * 7, [1] * 8 + [0] * 3])
    with no_grad():
        embedded = plain(IDS, mask, position_ids=np.arange(5, 16), output_hidden_states=True).hidden_states[0].numpy()
        out = model(IDS, mask, output_hidden_states=True)
    np.testing.assert_array_equal(out.hidden_states[0].numpy(), embedded)
    at = model.encoder.layer[0].attention.self
    q, k, v = (embedded @ one.weight.numpy().T + one.bias.numpy() for one in (at.query, at.key, at.value))
    table = at.prefix.weight.numpy()
    attended = np.zeros_like(q)
    for b, length in enumerate(mask.sum(axis=1)):
        keys, values = (np.concatenate([p, x[b, :length]]) for p, x in ((table[:, :24], k), (table[:, 24:], v)))
        for head in range(4):
            part = slice(6 * head, 6 * head + 6)
            scores = q[b, :length, part] @ keys[:, part].T / np.sqrt(6)
            p = np.exp(scores - scores.max(1, keepdims=True))
            attended[b, :length, part] = p / p.sum(1, keepdims=True) @ values[:, part]
    end = model.encoder.layer[0].attention.output
    y = attended @ end.dense.weight.numpy().T + end.dense.bias.numpy() + embedded
    normed = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-12)
    captured: list[np.ndarray] = []
    inner = type(model.encoder.layer[0].intermediate)
    call = inner.__call__
    monkeypatch.setattr(inner, "__call__", lambda self, x: captured.append(x.numpy().copy()) or call(self, x))
    model(IDS, mask)
    np.testing.assert_allclose(captured[0], normed[mask == 1], atol=2e-5)


def test_packed_padded_and_single_sequences_give_the_same() -> None:
    model = get_peft_model(mb.BertModel(QUIET, seed=3), PrefixTuningConfig(num_virtual_tokens=4))
    mask = np.array([[1] * 11, [0] * 11, [1] * 3 + [0] * 8])
    padded = model(IDS, mask).last_hidden_state.numpy()
    packed = model(np.concatenate([IDS[0], IDS[2, :3]]), cu_seqlens=[0, 11, 14]).last_hidden_state.numpy()
    np.testing.assert_allclose(packed, padded[mask == 1], atol=1e-5)
    np.testing.assert_allclose(model(IDS[2:, :3]).last_hidden_state.numpy()[0], packed[11:], atol=1e-5)
    assert not padded[1].any()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_formula(checkpointing: bool) -> None:
    model = get_peft_model(classifier(QUIET, dtype="float64"), FOR_TEXTS).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    mask = np.array([[1] * 11, [1] * 4 + [0] * 7, [1] * 8 + [0] * 3])
    model(IDS, mask, labels=CLASSES).loss.backward()
    rng, trained = np.random.default_rng(0), model.trained()
    assert {*trained} == {*(f"prompt_embeddings.{i}" for i in range(3)), "base_model.classifier.weight",
                          "base_model.classifier.bias"}  # fmt: skip
    start = {name: p.numpy().copy() for name, p in trained.items()}
    way = {name: rng.standard_normal(p.shape) for name, p in trained.items()}
    slope = sum(float((way[name] * p.grad).sum()) for name, p in trained.items())
    losses = []
    for step in (1e-6, -1e-6):
        for name, p in trained.items():
            p.assign(start[name] + step * way[name])
        losses.append(model(IDS, mask, labels=CLASSES).loss.item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)


def test_training_leaves_the_base_and_unloading_gives_it_back(tmp_path: Path) -> None:
    model = get_peft_model(masked_lm(), PrefixTuningConfig(num_virtual_tokens=2))
    before, digest = {n: p.numpy().tobytes() for n, p in masked_lm().named_parameters()}, model.base_sha256()
    optimizer = mb.AdamW(model.parameters(), lr=1e-2)
    start = logits(model)
    model.train()(IDS, labels=LABELS).loss.backward()
    optimizer.step()
    assert np.abs(logits(model.eval()) - start).max() > 1e-4
    assert model.base_sha256() == digest and {p.data.size for g in optimizer.groups for p in g.params} == {2 * 48}
    with pytest.raises(mb.UserError, match="cannot be merged"):
        model.merge_and_unload()
    plain = model.unload()
    assert {n: p.numpy().tobytes() for n, p in plain.named_parameters()} == before
    np.testing.assert_array_equal(logits(plain), logits(masked_lm()))


def test_there_are_as_many_positions_fewer_as_the_prefix_has() -> None:
    model = get_peft_model(mb.BertModel(QUIET), PrefixTuningConfig(num_virtual_tokens=20))
    model(np.ones((1, 4), int))
    with pytest.raises(mb.UserError, match="5 tokens is too long: beside a prefix of 20 there are positions for 4"):
        model(np.ones((1, 5), int))
    with pytest.raises(mb.UserError, match="output_attentions: not of a model with a prefix"):
        model(np.ones((1, 4), int), output_attentions=True)
    for config, message in (
        ({"num_virtual_tokens": 24}, "fewer than the model's 24 positions"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens: expected a whole number above 0"),
        ({"prefix_projection": True}, "prefix_projection: expected False"),
        ({"task_type": "SEQ_CLS"}, "head named classifier or score"),
    ):
        with pytest.raises(mb.UserError, match=message):
            get_peft_model(mb.BertModel(QUIET), PrefixTuningConfig(**config))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = get_peft_model(classifier(), FOR_TEXTS)
    model.classifier.weight.assign(model.classifier.weight.numpy() + 1)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: array.shape for name, array in held.items()} == {
        "prompt_embeddings": (3, 144), "base_model.classifier.weight": (2, 24), "base_model.classifier.bias": (2,),
    }  # fmt: skip
    loaded = load_peft_model(classifier(), tmp_path)
    assert isinstance(loaded, PrefixTuningModel)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="another base"):
        load_peft_model(classifier(seed=4), tmp_path)


HEAD = "base_model.classifier.bias"
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no table": ({"prompt_embeddings": None}, {}, r"prompt_embeddings is missing, expected \(3, 144\)"),
    "another length": ({}, {"num_virtual_tokens": 4}, r"prompt_embeddings is \(3, 144\), expected \(4, 144\)"),
    "no head": ({HEAD: None}, {}, f"missing: {HEAD}"),
    "surplus": ({"base_model.qa_outputs.bias": np.zeros(2, np.float32)}, {}, "surplus: base_model.qa_outputs.bias"),
    "an encoder and a decoder": ({}, {"num_transformer_submodules": 2}, "num_transformer_submodules: expected 1"),
}


@pytest.mark.parametrize("tensors, config, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_file_is_refused_in_one_line_and_leaves_the_model_as_it_was(
    tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    get_peft_model(classifier(), FOR_TEXTS).save_pretrained(tmp_path)
    held = {**load_file(tmp_path / "adapter_model.safetensors"), **tensors}
    save_file({n: a for n, a in held.items() if a is not None}, tmp_path / "adapter_model.safetensors")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, **config}))
    model = classifier()
    with pytest.raises(mb.UserError, match=message) as caught:
        load_peft_model(model, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    np.testing.assert_array_equal(logits(model), logits(classifier()))
