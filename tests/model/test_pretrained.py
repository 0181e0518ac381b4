"""from_pretrained: what it takes, what it says of weights that do not fit, and what it returns."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.model.pretrained import ABSENT
from minibert.train.optim import AdamW

SMALL = mb.BertConfig(
    vocab_size=11, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=6,
    max_position_embeddings=8,
)  # fmt: skip
IDS = np.arange(1, 7).reshape(2, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BertForPreTraining of two layers."""
    place = tmp_path_factory.mktemp("whole")
    mb.BertForPreTraining(SMALL, backend="numpy", seed=1).save_pretrained(place)
    return place


def load(kind: Any, folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, backend="numpy", **options)


def test_what_finds_no_use_is_named_and_strict_refuses_it(folder: Path) -> None:
    with pytest.warns(UserWarning, match="unexpected: ") as told:
        model, info = load(mb.BertForMaskedLM, folder, num_hidden_layers=1, output_loading_info=True)
    (message,) = (str(each.message) for each in told)
    assert message.startswith(f"{folder}: ") and "\n" not in message and told[0].filename == __file__
    for name in ("bert.encoder.layer.1.*", "bert.pooler.dense.weight", "cls.seq_relationship.bias"):
        assert name in message
    unexpected = {name for name in read_arrays(folder / "model.safetensors")[0] if name not in model.state_dict()}
    assert info == {"missing_keys": set(), "unexpected_keys": unexpected, "mismatched_keys": set(), "error_msgs": []}
    assert len(unexpected) == 16 + 4
    with pytest.raises(mb.UserError, match=r"unexpected: .*cls\.seq_relationship\.bias") as error:
        load(mb.BertForMaskedLM, folder, strict=True)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_what_fits_is_loaded_in_silence(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = load(mb.BertForPreTraining, folder, strict=True, output_loading_info=True)
    assert not any(info.values()) and not model.training


def test_what_is_missing_is_drawn_and_named(folder: Path, tmp_path: Path) -> None:
    arrays = read_arrays(folder / "model.safetensors")[0]
    lost = {name for name in arrays if ".layer.0." in name}
    write_arrays(tmp_path / "model.safetensors", {n: a for n, a in arrays.items() if n not in lost})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.warns(UserWarning, match=r"missing: bert.encoder.layer.0.\* \(.*newly initialised"):
        model, info = load(mb.BertForPreTraining, tmp_path, seed=1, output_loading_info=True)
    assert info["missing_keys"] == lost
    np.testing.assert_equal(model.state_dict(), arrays)  # drawn as at first: by seed and name


def test_shapes_that_differ_are_one_short_line_or_are_drawn_anew(folder: Path) -> None:
    with pytest.raises(mb.UserError, match=r"weight is \(11, 4\), expected \(11, 6\)") as error:
        load(mb.BertForPreTraining, folder, hidden_size=6)
    assert re.search(r" and \d+ more$", str(error.value)) and len(str(error.value)) < 500
    words = "bert.embeddings.word_embeddings.weight"
    options = {"vocab_size": 12, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with pytest.warns(UserWarning, match=rf"of another shape: {words} is \(11, 4\), expected \(12, 4\)"):
        model, info = load(mb.BertForPreTraining, folder, **options)
    assert info["mismatched_keys"] == {(words, (11, 4), (12, 4)), ("cls.predictions.bias", (11,), (12,))}
    assert np.isfinite(model(IDS).logits.numpy()).all()


def test_a_state_may_be_of_anything_that_becomes_an_array(folder: Path) -> None:
    model = load(mb.BertForPreTraining, folder)
    other = mb.BertForPreTraining(SMALL, backend="numpy", seed=2)
    other.load_state_dict({name: array.tolist() for name, array in model.state_dict().items()})
    np.testing.assert_equal(other.state_dict(), model.state_dict())


def test_what_a_state_lacks_unpacks_as_from_torch(folder: Path) -> None:
    model = load(mb.BertForPreTraining, folder)
    missing, unexpected = model.load_state_dict(
        {"cls.seq_relationship.bias": np.ones(2), "x": np.ones(1)}, strict=False
    )
    assert unexpected == ("x",) and len(missing) == len(model.state_dict()) - 1
    before = model.state_dict()
    with pytest.raises(mb.UserError, match=r"do not fit the model: missing: .*; unexpected: x$") as error:
        model.load_state_dict({"cls.seq_relationship.bias": np.zeros(2), "x": np.ones(1)})
    assert len(str(error.value)) < 600
    np.testing.assert_equal(model.state_dict(), before)


def test_a_config_and_its_fields_may_be_given(folder: Path) -> None:
    kept = load(mb.BertForPreTraining, folder, hidden_dropout_prob=0.25, output_hidden_states=True).config
    assert kept == replace(SMALL, hidden_dropout_prob=0.25, output_hidden_states=True)
    given = replace(SMALL, layer_norm_eps=1e-3)
    assert load(mb.BertForPreTraining, folder, config=given).config == given


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (mb.BertModel, {"cache_dir": "x"}, ["'cache_dir'", "leave it out"]),
        (mb.BertModel, {"torch_dtype": "float32"}, ["'torch_dtype'", "dtype='float32'"]),
        (mb.BertModel, {"device_map": "auto"}, ["'device_map'", "backend='cupy'"]),
        (mb.BertForMaskedLM, {"add_pooling_layer": False}, ["'add_pooling_layer'", "BertModel"]),
        (mb.BertModel, {"config": {"hidden_size": 4}}, ["config", "BertConfig.from_dict"]),
        (mb.BertModel, {"hidden_dropout_prob": "0"}, ["hidden_dropout_prob", "float", "str"]),
    ],
)
def test_arguments_that_cannot_be_followed_are_refused(
    kind: Any, options: dict[str, Any], words: list[str], folder: Path
) -> None:
    with pytest.raises(mb.UserError) as error:
        load(kind, folder, **options)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words)


def test_without_a_pooling_layer(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"unexpected: bert\.pooler\.dense\.bias"):
        model = load(mb.BertModel, folder, add_pooling_layer=False)
    assert model.pooler is None and model(IDS).last_hidden_state.shape == (2, 3, 4)


@pytest.mark.parametrize("name", ["bert-base-uncased", "model.safetensors"])
def test_what_is_no_folder_is_said_to_be_none(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(mb.UserError, match=r"expected a folder with config\.json and model.safetensors"):
        mb.BertModel.from_pretrained(name)


REFUSED: dict[str, tuple[Any, str]] = {
    "a list of weights": (lambda m: m.load_state_dict([1, 2]), "expected a mapping from names to arrays, got list"),
    "complex weights": (
        lambda m: m.load_state_dict({n: v * 1j for n, v in m.state_dict().items()}),
        "expected an array of numbers, got ndarray of complex",
    ),
    "text for weights": (lambda m: m.load_state_dict(dict.fromkeys(m.state_dict(), "x")), "an array of numbers"),
    "no folder to read": (lambda m: type(m).from_pretrained(None), "a folder with a checkpoint, got NoneType"),
    "no folder to write": (lambda m: m.save_pretrained(None), "a folder to write to, got NoneType"),
    "no folder of a tokenizer": (lambda m: mb.data.load_tokenizer(None), "a tokenizer's folder or file, got NoneType"),
    "another library's config": (
        lambda m: type(m)(type("BertConfig", (), {"__module__": "transformers.models"})()),
        r"got that of transformers.models; give mb.BertConfig.from_dict\(config.to_dict\(\)\)",
    ),
    "another output": (lambda m: m(IDS).__setitem__("logits", 1), "only the loss can be set"),
    "a text for lr": (lambda m: AdamW(m.parameters(), lr="1e-3"), "AdamW: expected lr to be a number, got '1e-3'"),
    "no lr": (lambda m: AdamW(m.parameters(), lr=None), "AdamW: expected lr to be a number, got None"),
    "one beta": (lambda m: AdamW(m.parameters(), betas=0.9), "AdamW: expected betas to be two numbers, got 0.9"),
    "a model to train": (lambda m: AdamW(m), r"got BertForMaskedLM: give model.parameters\(\)"),
    "names to train": (lambda m: AdamW(m.named_parameters()), r"got tuple among them: give model.parameters\(\)"),
    "a name to train": (lambda m: AdamW([{"params": ["cls"]}]), r"got str among them: give model.parameters\(\)"),
    "one parameter": (lambda m: AdamW(m.parameters()[0]), "got one: put it into a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_slip_in_a_call_is_told_in_one_line(name: str) -> None:
    use, message = REFUSED[name]
    with pytest.raises(mb.UserError, match=message) as caught:
        use(mb.BertForMaskedLM(SMALL, "numpy"))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_scripts_ask_of_a_model() -> None:
    model = mb.BertForMaskedLM(SMALL, "numpy")
    assert model.num_parameters() == sum(p.size for p in model.state_dict().values())
    assert model.dtype == np.float32 and model.device == "cpu"
    out = model(IDS, labels=IDS)
    out["loss"] = out.loss * 2
    out.loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    for name in ABSENT:
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"BertForMaskedLM has no '{name}': {re.escape(ABSENT[name])}"):
            getattr(model, name)
    with pytest.raises(AttributeError, match=r"BertForMaskedLM has no 'nothing'$"):
        model.nothing  # noqa: B018


def test_weights_that_are_not_there_are_told_from_those_of_another_name(tmp_path: Path) -> None:
    mb.BertForMaskedLM(SMALL, "numpy").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(mb.UserError, match="is a pointer of git-lfs, not the file: fetch it by `git lfs pull`"):
        load(mb.BertForMaskedLM, tmp_path)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(mb.UserError, match=r"model.safetensors is a folder: expected the file"):
        load(mb.BertForMaskedLM, tmp_path)
    weights.rmdir()
    weights.symlink_to(tmp_path / "blob")
    with pytest.raises(mb.UserError, match=r"model.safetensors is a link to a file that is not there"):
        load(mb.BertForMaskedLM, tmp_path)


@pytest.mark.parity
def test_weights_of_torch_are_taken_in_bfloat16_and_with_their_gradients() -> None:
    import torch

    model = mb.BertForMaskedLM(SMALL, "numpy", seed=3)
    values = {n: torch.from_numpy(v) for n, v in model.state_dict().items()}
    for given in (
        {n: v.bfloat16() for n, v in values.items()},
        {n: torch.nn.Parameter(v) for n, v in values.items()},
    ):
        other = mb.BertForMaskedLM(SMALL, "numpy", seed=4)
        other.load_state_dict(given)
        for name, array in other.state_dict().items():
            np.testing.assert_array_equal(array, given[name].detach().float().numpy())


@pytest.mark.parametrize("dtype", ["float64", np.float64, np.dtype("float64"), "auto"])
def test_a_dtype_is_a_name_or_numpys_or_the_checkpoints(dtype: Any, tmp_path: Path) -> None:
    mb.BertForMaskedLM(SMALL, "numpy", "float64").save_pretrained(tmp_path)
    assert load(mb.BertForMaskedLM, tmp_path, dtype=dtype).bert.place.dtype == "float64"


@pytest.mark.parity
def test_a_dtype_of_torch_is_one_too(folder: Path) -> None:
    import torch

    assert load(mb.BertForPreTraining, folder, dtype=torch.float64).dtype == np.float64
