"""Bottleneck adapters: what is computed, what is trained, and files that are whole or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minibert as mb
from minibert.tuning import AdapterModel, BnConfig, DoubleSeqBnConfig, SeqBnConfig, get_peft_model, load_peft_model
from tests.small_model import CONFIG, IDS, LABELS, QUIET, logits, masked_lm

LABELLED = replace(CONFIG, id2label={0: "no", 1: "yes", 2: "perhaps"})
CLASSES = np.array([2, 0, 1])
HOULSBY, PFEIFFER = DoubleSeqBnConfig(name="news", reduction_factor=6), SeqBnConfig(name="news", reduction_factor=6)


def classifier(config: mb.BertConfig = LABELLED, seed: int = 3, **more: Any) -> Any:
    return mb.BertForSequenceClassification(config, seed=seed, **more)


def train(model: Any, steps: int = 2) -> None:
    optimizer = mb.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=CLASSES).loss.backward()
        optimizer.step()
    model.eval()


def scramble(model: Any, std: float = 0.3) -> None:
    rng = np.random.default_rng(5)
    for parameter in model.trained().values():
        parameter.assign(parameter.numpy() + std * rng.standard_normal(parameter.shape))


@pytest.mark.parametrize("config", [HOULSBY, PFEIFFER], ids=["houlsby", "pfeiffer"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_training_moves_adapters_and_head_and_leaves_the_base(config: BnConfig, backend: str) -> None:
    model = get_peft_model(classifier(backend=backend), config)
    before = {name: p.numpy().copy() for name, p in model.named_parameters()}
    start, digest = logits(model), model.base_sha256()
    np.testing.assert_allclose(start, logits(classifier(backend=backend)), atol=0.1)  # nearly what it was
    train(model)
    assert model.base_sha256() == digest
    for name, p in model.named_parameters():
        moved = "bottleneck" in name or name.startswith("classifier")
        assert (p.numpy().tobytes() != before[name].tobytes()) == moved == p.requires_grad, name
    assert np.abs(logits(model) - start).max() > 1e-3
    ends = {"attention.output", "output"} if config is HOULSBY else {"output"}
    assert {*model.layers} == {f"bert.encoder.layer.{i}.{end}" for i in range(3) for end in ends}
    model.unload()
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in classifier().named_parameters()}


@pytest.mark.parametrize("config", [
    HOULSBY, PFEIFFER, replace(HOULSBY, scaling=3.0, non_linearity="gelu"), replace(PFEIFFER, non_linearity="tanh"),
], ids=str)  # fmt: skip
def test_what_an_adapter_adds_is_by_the_formula(config: BnConfig) -> None:
    model = get_peft_model(classifier(QUIET), config)
    scramble(model)
    layer, end = next(iter(model.layers.items()))
    at, rng = model.places[layer], np.random.default_rng(0)
    x, residual = (mb.Tensor(rng.standard_normal((5, 24)).astype(np.float32), model.backend) for _ in range(2))
    got = end(x, residual, at.LayerNorm, {"rate": 0.0}).numpy()
    read = x.numpy().astype(float)
    if config.original_ln_before:
        total = read + residual.numpy()
        read = (total - total.mean(1, keepdims=True)) / np.sqrt(total.var(1, keepdims=True) + 1e-12)
        read = read * at.LayerNorm.weight.numpy() + at.LayerNorm.bias.numpy()
    z = read @ end.adapter_down.weight.numpy().T + end.adapter_down.bias.numpy()
    assert z.shape == (5, 4)
    from scipy.special import ndtr

    f = {"swish": lambda z: z / (1 + np.exp(-z)), "relu": lambda z: np.maximum(z, 0), "tanh": np.tanh,
         "gelu": lambda z: z * ndtr(z)}[config.non_linearity]  # fmt: skip
    expected = config.scaling * (f(z) @ end.adapter_up.weight.numpy().T + end.adapter_up.bias.numpy())
    np.testing.assert_allclose(got - x.numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("config", [HOULSBY, PFEIFFER], ids=["houlsby", "pfeiffer"])
def test_gradients_are_those_of_the_formula_with_and_without_recomputation(config: BnConfig) -> None:
    model = get_peft_model(classifier(replace(LABELLED, **dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)), dtype="float64"), config)  # fmt: skip
    scramble(model, 0.1)
    rng, trained = np.random.default_rng(0), model.trained()
    model.train()(IDS, labels=CLASSES).loss.backward()
    gradients = {name: np.array(p.grad) for name, p in trained.items()}
    start = {name: p.numpy().copy() for name, p in trained.items()}
    way = {name: rng.standard_normal(p.shape) for name, p in trained.items()}
    slope = sum(float((way[name] * gradient).sum()) for name, gradient in gradients.items())
    losses = []
    for step in (1e-6, -1e-6):
        for name, p in trained.items():
            p.assign(start[name] + step * way[name])
        losses.append(model(IDS, labels=CLASSES).loss.item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5)
    model.assign(start)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(IDS, labels=CLASSES).loss.backward()
    for name, p in trained.items():
        np.testing.assert_array_equal(p.grad, gradients[name])


def test_dropout_of_an_adapter_is_named_by_the_step() -> None:
    model = get_peft_model(classifier(QUIET), replace(HOULSBY, dropout=0.5)).train()
    scramble(model)
    outputs = []
    for step in (4, 5, 4):
        model.step = step
        outputs.append(logits(model))
    assert (outputs[0] != outputs[1]).any() and (outputs[0] == outputs[2]).all()
    with pytest.raises(mb.UserError, match="call of the tuned model"):
        model.model(IDS)


def test_first_values_are_drawn_as_houlsby_drew_them() -> None:
    model = get_peft_model(
        mb.BertModel(replace(CONFIG, hidden_size=64)), DoubleSeqBnConfig(reduction_factor=1, init_weights="houlsby")
    )
    weights = np.concatenate([p.numpy().ravel() for name, p in model.trained().items() if name.endswith("weight")])
    assert np.abs(weights).max() <= 0.02 and np.abs(weights).max() > 0.0199
    assert weights.std() == pytest.approx(0.01 * 0.8796, rel=0.01)  # of a normal distribution cut at two sigma
    assert all(not p.numpy().any() for name, p in model.trained().items() if name.endswith("bias"))


def test_layers_are_left_out_and_a_model_without_a_task_head_trains_adapters_alone() -> None:
    model = get_peft_model(masked_lm(), replace(HOULSBY, leave_out=[0, 2], mh_adapter=False))
    assert [*model.layers] == ["bert.encoder.layer.1.output"] and not model.of_base
    before = logits(model)
    model.train()(IDS, labels=LABELS).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"bert.encoder.layer.1.output.bottleneck.adapter_{way}.{kind}"
        for way in ("down", "up") for kind in ("weight", "bias")
    }  # fmt: skip
    scramble(model)
    assert np.abs(logits(model.eval()) - before).max() > 1e-3


@pytest.mark.parametrize("config", [HOULSBY, PFEIFFER], ids=["houlsby", "pfeiffer"])
def test_what_is_saved_comes_back_bit_for_bit(config: BnConfig, tmp_path: Path) -> None:
    model = get_peft_model(classifier(), config)
    train(model)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter.safetensors")
    assert "bert.encoder.layer.0.output.adapters.news.adapter_down.0.weight" in held
    assert {*load_file(tmp_path / "model_head.safetensors")} == {"classifier.weight", "classifier.bias"}
    loaded = load_peft_model(classifier(), tmp_path)
    assert isinstance(loaded, AdapterModel)
    np.testing.assert_array_equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning) as warned:  # a bare encoder takes the adapter; the head has no place there
        load_peft_model(mb.BertModel(LABELLED, seed=3), tmp_path)
    assert len(warned) == 1 and "its head is not used" in str(warned[0].message)
    other = replace(LABELLED, id2label={0: "yes", 1: "no", 2: "perhaps"})
    with pytest.warns(UserWarning, match="trained for the labels no, yes, perhaps"):
        load_peft_model(classifier(other), tmp_path)
    with pytest.warns(UserWarning, match="another base"):
        load_peft_model(classifier(seed=4), tmp_path)


A = "bert.encoder.layer.1.output.adapters.news.adapter_up.weight"
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": ({A: None}, {}, f"missing: {A}"),
    "surplus": ({A.replace("1", "3"): np.zeros((24, 4), np.float32)}, {}, "surplus: .*layer.3"),
    "shape": ({}, {"reduction_factor": 12}, r"is \(4,.*\), expected \(2,"),
    "half": ({}, {"mh_adapter": False}, "surplus: .*attention.output"),
    "parallel": ({}, {"is_parallel": True}, "is_parallel: supported is False alone, got True"),
    "lora": ({}, {"architecture": "lora"}, "architecture: supported is None alone, got 'lora'"),
    "function": ({}, {"non_linearity": "leakyrelu"}, "non_linearity: expected one of swish"),
    "factor by layer": ({}, {"reduction_factor": {"default": 16}}, "reduction_factor: expected a number"),
    "learned scaling": ({}, {"scaling": "learned"}, "scaling: expected a number"),
}


@pytest.mark.parametrize("tensors, config, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_file_is_refused_in_one_line_and_leaves_the_model_as_it_was(
    tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    get_peft_model(classifier(), HOULSBY).save_pretrained(tmp_path)
    held = {**load_file(tmp_path / "adapter.safetensors"), **tensors}
    save_file({name: array for name, array in held.items() if array is not None}, tmp_path / "adapter.safetensors")
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    values["config"] |= config
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    model = classifier()
    with pytest.raises(mb.UserError, match=message) as caught:
        load_peft_model(model, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert not any("bottleneck" in name for name, _ in model.named_parameters())
    np.testing.assert_array_equal(logits(model), logits(classifier()))


def test_a_folder_without_safetensors_says_how_to_get_them(tmp_path: Path) -> None:
    get_peft_model(classifier(), HOULSBY).save_pretrained(tmp_path)
    (tmp_path / "adapter.safetensors").rename(tmp_path / "pytorch_adapter.bin")
    with pytest.raises(mb.UserError, match="save it with use_safetensors=True"):
        load_peft_model(classifier(), tmp_path)
    with pytest.raises(mb.UserError, match="no adapter at"):
        AdapterModel.from_pretrained(classifier(), tmp_path / "nowhere")
    with pytest.raises(mb.UserError, match="cannot be merged"):
        get_peft_model(classifier(), HOULSBY).merge_and_unload()
    with pytest.raises(mb.UserError, match=r"expected one of LoraConfig, .*, got dict"):
        get_peft_model(classifier(), {"r": 8})
