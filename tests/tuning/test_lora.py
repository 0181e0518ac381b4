"""LoRA: the base stays as it is and costs nothing, the update is what the paper says, files are whole or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import minibert as mb
from minibert.kernels.op import Op
from minibert.model.nn import Linear
from minibert.train.optim import parameter_groups
from minibert.tuning import LoraConfig, PeftModel, get_peft_model
from minibert.tuning.targets import named_modules
from tests.small_model import CONFIG, IDS, LABELS, logits, masked_lm

QUERY = "bert.encoder.layer.{}.attention.self.query"


def tuned(backend: str = "numba", changes: dict[str, Any] | None = None, **config: Any) -> PeftModel:
    return get_peft_model(masked_lm(backend, **(changes or {})), LoraConfig(**{"r": 4, **config}))


def train(model: Any, steps: int = 2, lr: float = 1e-2) -> mb.AdamW:
    optimizer = mb.AdamW(parameter_groups(model, 0.01), lr=lr)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=LABELS).loss.backward()
        optimizer.step()
    model.eval()
    return optimizer


def values_of(model: Any) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("changes", [{}, {"target_modules": "all-linear", "lora_dropout": 0.2}], ids=["qv", "all"])
def test_training_moves_what_is_tuned_and_leaves_the_base_byte_for_byte(backend: str, changes: dict[str, Any]) -> None:
    plain = masked_lm(backend)
    expected = logits(plain)
    model = tuned(backend, **changes)
    np.testing.assert_array_equal(logits(model), expected)  # B is 0: training begins at the model
    before, digest, adapters = values_of(plain), model.base_sha256(), model.state_dict()
    train(model)
    after = values_of(model.model)
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
    assert model.base_sha256() == digest
    assert all((model.state_dict()[name] != value).any() for name, value in adapters.items())
    assert np.abs(logits(model) - expected).max() > 1e-3


@pytest.mark.parametrize("config", [
    {"lora_alpha": 12},
    {"use_rslora": True, "lora_alpha": 3, "init_lora_weights": "gaussian"},
    {"target_modules": ["key"], "rank_pattern": {r"layer\.1.*key": 2}, "alpha_pattern": {"key": 5.0}},
    {"target_modules": "all-linear", "init_lora_weights": False},
    {"target_modules": ["output.dense", "intermediate.dense"], "layers_to_transform": [0, 2]},
], ids=str)  # fmt: skip
def test_the_update_is_that_of_a_changed_weight(config: dict[str, Any]) -> None:
    """W + s B A by hand, in the weights of a plain model, and by merging."""
    model = tuned(**{"init_lora_weights": False, **config})
    for layer in model.layers.values():
        layer.lora_B.assign(np.random.default_rng(5).standard_normal(layer.lora_B.shape) * 0.1)
    got, plain = logits(model), masked_lm()
    linears = {name: m for name, m in named_modules(plain) if isinstance(m, Linear)}
    for name, layer in model.layers.items():
        rank = model.peft_config.rank_pattern.get(r"layer\.1.*key", 4) if "layer.1" in name else 4
        alpha = model.peft_config.alpha_pattern.get("key", model.peft_config.lora_alpha)
        scaling = alpha / (rank**0.5 if model.peft_config.use_rslora else rank)
        assert layer.lora_A.shape[0] == rank
        update = scaling * layer.lora_B.numpy().astype(np.float64) @ layer.lora_A.numpy()
        linears[name].weight.assign(linears[name].weight.numpy() + update)
    expected = logits(plain)
    assert np.abs(got - logits(masked_lm())).max() > 1e-3
    np.testing.assert_allclose(got, expected, atol=2e-6)
    merged = model.merge_and_unload()
    assert [*values_of(merged)] == [*values_of(plain)]
    np.testing.assert_allclose(logits(merged), expected, atol=2e-6)
    assert all(p.requires_grad for p in merged.parameters())


def test_gradients_are_those_of_the_formula() -> None:
    """In float64, against differences of the loss along a random direction."""
    model = get_peft_model(
        mb.BertForMaskedLM(CONFIG, dtype="float64", seed=3),
        LoraConfig(r=3, target_modules=r".*(dense|query|value|_embeddings)", init_lora_weights=False, bias="all"),
    )
    model(IDS, labels=LABELS).loss.backward()
    rng = np.random.default_rng(0)
    trained = model.trained()
    start = {name: p.numpy().copy() for name, p in trained.items()}
    way = {name: rng.standard_normal(p.shape) for name, p in trained.items()}
    slope = sum(float((way[name] * p.grad).sum()) for name, p in trained.items())
    losses = []
    for step in (1e-5, -1e-5):
        for name, p in trained.items():
            p.assign(start[name] + step * way[name])
        losses.append(model(IDS, labels=LABELS).loss.item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_an_embedding_has_an_update_in_the_model_and_called_alone() -> None:
    tables = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
    config = LoraConfig(r=3, lora_alpha=2, target_modules=[*tables, "query"])
    model, plain = get_peft_model(mb.BertModel(CONFIG, seed=3), config), mb.BertModel(CONFIG, seed=3)
    ids = np.concatenate([IDS, IDS[:, :2] * 0], axis=1)  # with padding that is not masked
    np.testing.assert_array_equal(model(ids).last_hidden_state.numpy(), plain(ids).last_hidden_state.numpy())
    rng = np.random.default_rng(0)
    for name, p in model.trained().items():
        p.assign(p.numpy() + 0.2 * rng.standard_normal(p.shape) * ("_A" in name))
    for name in tables:
        table, layer = getattr(plain.embeddings, name), model.layers[f"embeddings.{name}"]
        update = 2 / 3 * (layer.lora_embedding_B.numpy() @ layer.lora_embedding_A.numpy()).T
        table.weight.assign(table.weight.numpy() + update)
    query = model.layers["encoder.layer.1.attention.self.query"]
    assert not query.lora_B.numpy().any()  # its update is none yet
    expected = plain(ids).last_hidden_state.numpy()
    np.testing.assert_allclose(model(ids).last_hidden_state.numpy(), expected, atol=1e-5)
    embeds = model.get_input_embeddings()(ids)
    np.testing.assert_allclose(embeds.numpy(), plain.get_input_embeddings()(ids).numpy(), atol=1e-6)
    np.testing.assert_allclose(model(inputs_embeds=embeds).last_hidden_state.numpy(), expected, atol=1e-5)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(merged(ids).last_hidden_state.numpy(), expected, atol=1e-5)
    with pytest.raises(mb.UserError, match="is also the decoder"):
        tuned(target_modules=["word_embeddings"]).merge_and_unload()


def test_dropout_is_another_mask_each_step_and_comes_back_with_it_and_in_recomputation() -> None:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tuned(lora_dropout=0.5, init_lora_weights=False, changes=quiet).train()

    def gradients(step: int) -> dict[str, np.ndarray]:
        model.step = step
        model.zero_grad()
        model(IDS, labels=LABELS).loss.backward()
        return {name: np.array(p.grad) for name, p in model.trained().items()}

    first, second, again = gradients(0), gradients(1), gradients(0)
    assert any((first[name] != second[name]).any() for name in first)
    model.gradient_checkpointing_enable()
    recomputed = gradients(0)
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
        np.testing.assert_array_equal(recomputed[name], value)
    with pytest.raises(mb.UserError, match="call of the PeftModel"):
        model.model(IDS)


# ----------------------------------------------------------------------------------------- what is frozen costs nothing


def test_what_is_frozen_has_no_gradient_computed_and_no_optimiser_memory() -> None:
    model = tuned(bias="lora_only")
    calls: dict[str, int] = {}

    def count(op: Op, arrays: Any, params: Any, call: Any) -> Any:
        calls[op.name] = calls.get(op.name, 0) + 1
        return call()

    with model.backend.watched_by(count):
        optimizer = train(model, steps=1)
    assert not calls.keys() & {"linear_grad", "add_linear_grad", "embedding_grad"}
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    trained = sum(p.data.size for p in model.trained().values())
    assert sum(group.exp_avg.size for group in optimizer.groups) == trained == model.get_nb_trainable_parameters()[0]


def test_an_optimiser_of_frozen_parameters_alone_is_refused() -> None:
    model = masked_lm()
    for p in model.parameters():
        p.requires_grad = False
    with pytest.raises(mb.UserError, match="every parameter is frozen"):
        mb.AdamW(model.parameters())


def test_freezing_changes_no_gradient_of_the_rest() -> None:
    gradients = []
    for frozen in (False, True):
        model = masked_lm()
        for name, p in model.named_parameters():
            p.requires_grad = not frozen or (name.endswith("bias") and "layer.1" in name)
        model(IDS, labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[1].keys() < gradients[0].keys()
    for name, value in gradients[1].items():
        np.testing.assert_array_equal(value, gradients[0][name])


# ------------------------------------------------------------------------------------------------- which are targets


@pytest.mark.parametrize("config, endings", [
    ({}, ["query", "value"]),
    ({"target_modules": {"output.dense"}}, ["attention.output.dense", "output.dense"]),
    ({"target_modules": r".*layer\.1\..*(key|value)"}, ["key", "value"]),
    ({"target_modules": ["dense"], "exclude_modules": ["transform.dense", "intermediate.dense"]}, ["output.dense"]),
    ({"target_modules": ["key"], "layers_to_transform": 1, "layers_pattern": "layer"}, ["key"]),
], ids=str)  # fmt: skip
def test_targets_are_named_by_their_ends(config: dict[str, Any], endings: list[str]) -> None:
    names = set(tuned(**config).layers)
    assert names and all(any(name.endswith(f".{one}") for one in endings) for name in names)
    layers = {0, 1, 2} if "layer" not in str(config.values()) else {1}
    assert {int(name.split("layer.")[1][0]) for name in names} == layers


def test_modules_to_save_are_trained_whole_and_are_no_targets() -> None:
    model = get_peft_model(
        mb.BertModel(CONFIG, seed=3), LoraConfig(r=2, target_modules=["dense"], modules_to_save=["pooler"])
    )
    assert not any("pooler" in name for name in model.layers)
    whole = {name for name in model.trained() if "lora" not in name}
    assert whole == {"base_model.model.pooler.dense.weight", "base_model.model.pooler.dense.bias"}


WRONG = {
    "rank": ({"r": 0}, "r: expected a whole number above 0, got 0"),
    "alpha": ({"lora_alpha": -1}, "lora_alpha: expected a number above 0"),
    "dropout": ({"lora_dropout": 1.0}, "lora_dropout"),
    "dora": ({"use_dora": True}, "use_dora: expected False: minibert has no such thing"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "initialisation": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "bias": ({"bias": "some"}, "bias: expected 'none' or"),
    "nowhere": ({"target_modules": ["query", "quary"]}, "no 'quary': it has dense, key, query, value"),
    "no layer": ({"target_modules": "quary"}, "'quary' is no linear layer"),
    "no linear layer": (
        {"target_modules": ["embeddings.LayerNorm"]},
        "LORA has no update of bert.embeddings.LayerNorm",
    ),
    "pattern": ({"rank_pattern": {"key": 3}}, "'key' is none of the target modules"),
    "regex": ({"target_modules": "(query"}, "is no regex"),
    "head": ({"task_type": "SEQ_CLS"}, "head named classifier or score"),
    "task": ({"task_type": "SUMMARY"}, "task_type: expected None or one of SEQ_CLS"),
    "module": ({"modules_to_save": ["classifer"]}, "has no module 'classifer'"),
    "tied": ({"modules_to_save": ["cls"]}, "tie_word_embeddings=False"),
}


@pytest.mark.parametrize("config, message", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(mb.UserError, match=message.replace("(", r"\(")):
        tuned(**config)


def test_a_decoder_has_no_update() -> None:
    with pytest.raises(mb.UserError, match=r"LORA has no update of cls.predictions.decoder"):
        tuned(changes={"tie_word_embeddings": False}, target_modules=["decoder"])


def test_a_tuned_model_is_not_tuned_again() -> None:
    model = tuned()
    with pytest.raises(mb.UserError, match="tuned already"):
        get_peft_model(model.model, LoraConfig())
    with pytest.raises(mb.UserError, match="expected a model"):
        get_peft_model(model, LoraConfig())  # type: ignore[arg-type]
    get_peft_model(model.unload(), LoraConfig())


# -------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    folder = tmp_path_factory.mktemp("adapter")
    model = tuned(lora_alpha=16, bias="all", lora_dropout=0.1)
    train(model)
    model.save_pretrained(folder)
    return folder, logits(model)


def test_what_is_saved_is_what_is_trained_and_comes_back_bit_for_bit(saved: tuple[Path, np.ndarray]) -> None:
    folder, expected = saved
    held = load_file(folder / "adapter_model.safetensors")
    trained = tuned(bias="all").trained()
    assert held.keys() - trained.keys() == {"base_model.model.cls.predictions.decoder.bias"}
    model = PeftModel.from_pretrained(masked_lm(), folder)
    np.testing.assert_array_equal(logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())
    model = PeftModel.from_pretrained(masked_lm(), folder, is_trainable=True)
    assert {*model.trained()} == {*trained} and all(p.requires_grad for p in model.trained().values())
    train(model, steps=1)


def test_another_base_is_said(saved: tuple[Path, np.ndarray]) -> None:
    with pytest.warns(UserWarning, match="trained on another base"):
        PeftModel.from_pretrained(masked_lm(seed=4), saved[0])


def rewritten(saved: tuple[Path, np.ndarray], to: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """The adapter in another folder, with tensors and settings that are other, more or (None) fewer."""
    held = {**load_file(saved[0] / "adapter_model.safetensors"), **tensors}
    save_file({name: array for name, array in held.items() if array is not None}, to / "adapter_model.safetensors")
    values = {**json.loads((saved[0] / "adapter_config.json").read_text()), **config}
    (to / "adapter_config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))
    return to


A = f"base_model.model.{QUERY.format(1)}.lora_A.weight"
FAULTS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "missing": ({A: None}, {}, f"missing: {A}"),
    "surplus": ({A.replace("query", "key"): np.zeros((4, 24), np.float32)}, {}, "surplus: .*key"),
    "half": ({}, {"target_modules": ["query"]}, "surplus: .*value"),
    "shape": ({A: np.zeros((5, 24), np.float32)}, {}, r"lora_A.weight is \(5, 24\), expected \(4, 24\)"),
    "rank": ({}, {"r": 2}, r"expected \(2, 24\)"),
    "whole numbers": ({A: np.zeros((4, 24), np.int32)}, {}, "is of int32, expected floats"),
    "no kind": ({}, {"peft_type": "absent"}, "peft_type: expected one of LORA.*got None"),
    "another kind": ({}, {"peft_type": "IA3"}, "got 'IA3'"),
    "dora": ({}, {"use_dora": True}, "use_dora is not supported"),
    "tokens": ({}, {"trainable_token_indices": [3]}, "trainable_token_indices is not supported"),
    "rank in words": ({}, {"r": "eight"}, "r: expected a whole number"),
}


@pytest.mark.parametrize("tensors, config, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_file_is_refused_in_one_line_and_leaves_the_model_as_it_was(
    saved: tuple[Path, np.ndarray], tmp_path: Path, tensors: dict[str, Any], config: dict[str, Any], message: str
) -> None:
    rewritten(saved, tmp_path, tensors, **config)
    model = masked_lm()
    before = values_of(model)
    with pytest.raises(mb.UserError, match=message) as caught:
        PeftModel.from_pretrained(model, tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    after = values_of(model)
    assert before.keys() == after.keys() and all((after[name] == before[name]).all() for name in before)


def test_what_a_file_says_besides_is_ignored_with_a_warning_where_nobody_knows_it(
    saved: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    rewritten(saved, tmp_path, {}, target_modules=["query", "value", "q_proj"], peft_version="0.99", brand_new=3)
    with pytest.warns(UserWarning, match="brand_new"):
        model = PeftModel.from_pretrained(masked_lm(), tmp_path)
    np.testing.assert_array_equal(logits(model), saved[1])


def test_a_folder_without_an_adapter_is_told_apart_from_one_with_a_pickle(tmp_path: Path) -> None:
    for prepare, message in (
        (lambda: None, "no adapter_config.json"),
        (lambda: (tmp_path / "adapter_config.json").write_text("{}"), "no adapter_model.safetensors"),
        (lambda: (tmp_path / "adapter_model.bin").write_bytes(b""), "a pickle can run code"),
    ):
        prepare()
        with pytest.raises(mb.UserError, match=message):
            PeftModel.from_pretrained(masked_lm(), tmp_path)
    with pytest.raises(mb.UserError, match="no adapter at"):
        PeftModel.from_pretrained(masked_lm(), tmp_path / "nowhere")


def test_a_run_goes_on_from_its_state_bit_for_bit() -> None:
    whole, part = tuned(lora_dropout=0.1), tuned(lora_dropout=0.1)
    train(whole, steps=2)
    state = train(part, steps=1).state_dict()
    resumed = tuned(lora_dropout=0.1)
    resumed.load_state_dict(part.state_dict())
    optimizer = mb.AdamW(parameter_groups(resumed, 0.01), lr=1e-2)
    optimizer.load_state_dict(state)
    resumed.step = part.step
    resumed.train()(IDS, labels=LABELS).loss.backward()
    optimizer.step()
    for name, value in whole.state_dict().items():
        np.testing.assert_array_equal(resumed.state_dict()[name], value)


def test_a_copy_is_its_own() -> None:
    model = tuned(init_lora_weights=False)
    twin = copy.deepcopy(model)
    before = logits(twin)
    train(model)
    np.testing.assert_array_equal(logits(twin), before)
