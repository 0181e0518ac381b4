"""Models in int8: the same bits alone and in any batch, on one thread and three, from a folder and from memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.errors import UserError, pip_install
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.model.nn import Linear
from minibert.model.quantized import Int8Linear, int8_layers, linear_layers, make_int8
from minibert.model.tensor import no_grad
from tests.small_model import IDS, QUIET

LAYERS = 6 * QUIET.num_hidden_layers


def in_int8(backend: str = "numba", dtype: str = "float32", only: str = "encoder.") -> Any:
    model = mb.BertForMaskedLM(QUIET, backend, dtype, seed=3)
    make_int8(model, [name for name, _, _ in linear_layers(model) if only in name], values=True)
    return model.prepack()


def states(model: Any, ids: np.ndarray = IDS) -> np.ndarray:
    with no_grad():
        return np.array(model(ids).logits.numpy())


def test_the_encoder_is_in_int8_and_near_what_it_was() -> None:
    plain, model = mb.BertForMaskedLM(QUIET, "numba", seed=3), in_int8()
    assert len(int8_layers(model)) == LAYERS and all("encoder." in name for name in int8_layers(model))
    a, b = states(plain), states(model)
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_a_text_has_the_same_bits_in_any_batch_and_on_any_number_of_threads(backend: str) -> None:
    model = in_int8(backend)
    together = states(model)
    alone = np.concatenate([states(model, row[None]) for row in IDS])
    if backend == "numba":  # NumPy's BLAS sums the products in floats as it likes
        assert together.tobytes() == alone.tobytes()
    for _, order in model.backend.orders():
        with order:
            assert states(model).tobytes() == together.tobytes()
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize(("backend", "dtype"), [("numpy", "float32"), ("numba", "float64"), ("emulator", "float16")])
def test_backends_agree(backend: str, dtype: str) -> None:
    """A level of 8 bits is 1/255 of a row's range: where one is rounded the other way, so much is apart."""
    a, b = states(in_int8()), states(in_int8(backend, dtype)).astype(np.float32)
    assert np.abs(a - b).max() < (0.05 if dtype == "float16" else 0.02) * np.abs(a).max()


def test_a_folder_gives_the_same_bits(tmp_path: Path) -> None:
    model = in_int8()
    model.save_pretrained(tmp_path)
    again = mb.BertForMaskedLM.from_pretrained(tmp_path, "numba", strict=True)
    assert int8_layers(again) == int8_layers(model)
    assert states(again).tobytes() == states(model).tobytes()
    arrays = read_arrays(tmp_path / "model.safetensors")[0]
    weight = arrays["bert.encoder.layer.0.output.dense.weight"]
    scale = arrays["bert.encoder.layer.0.output.dense.weight_scale"]
    assert (weight.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (len(weight), 1))
    said = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert said["quant_method"] == "compressed-tensors" and said["format"] == "int-quantized"
    with pytest.warns(UserWarning, match="unexpected: cls"):
        bare = mb.BertModel.from_pretrained(tmp_path, "numba")  # by other names
    assert len(int8_layers(bare)) == LAYERS


def test_floats_that_are_read_again_say_nothing_of_int8(tmp_path: Path) -> None:
    in_int8().save_pretrained(tmp_path / "int8")
    config = mb.BertForMaskedLM.from_pretrained(tmp_path / "int8").config
    mb.BertForMaskedLM(config, "numpy").save_pretrained(tmp_path / "floats")  # new weights of that config
    assert "quantization_config" not in json.loads((tmp_path / "floats/config.json").read_text())


def test_some_of_what_is_one_product_may_be_in_int8() -> None:
    model = in_int8(only="self.key")
    assert len(int8_layers(model)) == QUIET.num_hidden_layers
    a, b = states(mb.BertForMaskedLM(QUIET, "numba", seed=3)), states(model)
    assert 0 < np.abs(a - b).max() < 0.05 * np.abs(a).max()


def test_a_weight_that_is_written_counts(tmp_path: Path) -> None:
    model = in_int8()
    before = states(model)
    layer: Any = dict((name, layer) for name, layer, _ in linear_layers(model))["bert.encoder.layer.2.output.dense"]
    layer.weight.assign(-layer.weight.numpy())
    turned = states(model)
    assert not np.array_equal(before, turned)
    layer.weight.assign(-layer.weight.numpy())
    assert states(model).tobytes() == before.tobytes()


def test_what_has_no_gradient_says_so() -> None:
    model = in_int8()
    assert states(model).shape == model(IDS).logits.numpy().shape  # nothing in it asks for one
    model.bert.embeddings.word_embeddings.weight.requires_grad = True
    with pytest.raises(UserError, match=r"no gradient: call the model under minibert\.no_grad"):
        model(IDS)
    with pytest.raises(UserError, match="AdamW: weights in int8 are not trained"):
        mb.train.AdamW(model.parameters())


def test_a_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    in_int8().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    arrays = read_arrays(path)[0]
    del arrays["bert.encoder.layer.1.intermediate.dense.weight_scale"]
    write_arrays(path, arrays, {"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.1\.intermediate\.dense\.weight is of int8, and there is no .*_scale"):
        mb.BertForMaskedLM.from_pretrained(tmp_path)


def test_floats_are_not_cut_to_integers() -> None:
    model = in_int8()
    with pytest.raises(UserError, match=r"expected int8, as the layer is that it is for"):
        model.load_state_dict(mb.BertForMaskedLM(QUIET, "numpy", seed=3).state_dict(), strict=False)


def test_a_layer_in_int8_is_a_linear_layer_to_who_looks_for_one() -> None:
    layer = Int8Linear(8, 4, mb.BertModel(replace(QUIET, num_hidden_layers=1), "numpy").place)
    assert isinstance(layer, Linear) and [p.declared_shape for p in layer.parameters()] == [(4, 8), (4, 1), (4,)]
    assert [p.dtype.name for p in layer.parameters()] == ["int8", "float32", "float32"]


@pytest.mark.parity
def test_transformers_computes_the_same_from_the_folder(tmp_path: Path) -> None:
    """With the activations rounded as ours are: by row, with a zero point."""
    import torch
    import transformers

    pytest.importorskip("compressed_tensors", reason=f"needs compressed-tensors: {pip_install('[parity]')}")
    model = in_int8("numpy")
    model.save_pretrained(tmp_path)
    theirs = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        found = theirs(torch.tensor(IDS)).logits.numpy()
    plain = states(mb.BertForMaskedLM(QUIET, "numpy", seed=3))
    apart, moved = np.abs(found - states(model)).max(), np.abs(plain - states(model)).max()
    assert apart < 0.05 * moved
