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
