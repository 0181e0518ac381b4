"""Which array of a file is which parameter of a model, and what is said of the rest."""

from __future__ import annotations

import numpy as np
import pytest

from minibert.errors import UserError
from minibert.model.matching import BIAS, DECODER, DECODER_BIAS, WORDS, LoadReport, match, named, own_decoder

EXPECTED: dict[str, tuple[int, ...]] = {
    WORDS: (11, 4),
    "bert.embeddings.LayerNorm.weight": (4,),
    "bert.embeddings.LayerNorm.bias": (4,),
    BIAS: (11,),
}
NOTHING = LoadReport()
FULL = {name: np.full(shape, i, np.float32) for i, (name, shape) in enumerate(EXPECTED.items())}


def same(matched: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert matched.keys() == expected.keys()
    np.testing.assert_equal(matched, expected)


def test_names_that_are_the_model_s_match() -> None:
    matched, report = match(FULL, EXPECTED)
    same(matched, FULL)
    assert report == NOTHING and str(report) == "every name matched"


def test_legacy_names_and_buffers() -> None:
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in FULL.items()
    }
    matched, report = match({**old, "bert.embeddings.position_ids": np.arange(5)[None]}, EXPECTED)
    same(matched, FULL)
    assert report == NOTHING


def test_a_bare_encoder_loads_into_a_headed_model_and_back() -> None:
    bare = {name.removeprefix("bert."): array for name, array in FULL.items() if name.startswith("bert.")}
    matched, report = match({**bare, "embeddings.position_ids": np.arange(5)[None]}, EXPECTED)
    same(matched, {name: array for name, array in FULL.items() if name.startswith("bert.")})
    assert report == LoadReport(missing_keys=(BIAS,)) and str(report) == "missing: cls.predictions.bias"
    matched, report = match(FULL, {name: array.shape for name, array in bare.items()})
    same(matched, bare)
    assert report == LoadReport(unexpected_keys=(BIAS,)) and str(report) == "unexpected: cls.predictions.bias"


def test_a_tied_decoder_in_the_file_is_no_second_weight() -> None:
    twice = {**FULL, DECODER: FULL[WORDS], DECODER_BIAS: FULL[BIAS]}
    matched, report = match(twice, EXPECTED)
    same(matched, FULL)
    assert report == NOTHING
    only = {name: array for name, array in twice.items() if name != BIAS}
    matched, report = match(only, EXPECTED)
    same(matched, FULL)
    assert report == NOTHING


def test_a_decoder_of_its_own_is_reported_by_a_tied_model_and_taken_by_an_untied_one() -> None:
    own = {**FULL, DECODER: FULL[WORDS] + 1, DECODER_BIAS: FULL[BIAS] + 1}
    matched, report = match(own, EXPECTED)
    same(matched, FULL)
    assert report == LoadReport(unexpected_keys=(DECODER, DECODER_BIAS))
    matched, report = match(own, {**EXPECTED, DECODER: (11, 4)})
    assert report == LoadReport(unexpected_keys=(BIAS,))  # of the two biases, the decoder's counts
    np.testing.assert_array_equal(matched[DECODER], FULL[WORDS] + 1)
    np.testing.assert_array_equal(matched[BIAS], FULL[BIAS] + 1)
    assert own_decoder(own) == DECODER and not own_decoder({**own, DECODER: FULL[WORDS]}) and not own_decoder(FULL)


def test_a_bias_of_the_tied_decoder_s_own_is_the_one_that_counts() -> None:
    matched, report = match({**FULL, DECODER_BIAS: FULL[BIAS] + 1}, EXPECTED)
    same(matched, {**FULL, BIAS: FULL[BIAS] + 1})
    assert report == LoadReport(unexpected_keys=(BIAS,))


def test_wrong_shapes_are_an_error_that_names_each_or_left_out() -> None:
    wrong = {**FULL, WORDS: np.zeros((12, 4)), BIAS: np.zeros(12)}
    with pytest.raises(UserError) as error:
        match(wrong, EXPECTED)
    told = f"{WORDS} is (12, 4), expected (11, 4), {BIAS} is (12,), expected (11,)"
    assert told in str(error.value)
    matched, report = match(wrong, EXPECTED, ignore_mismatched_sizes=True)
    same(matched, {name: array for name, array in FULL.items() if name not in (WORDS, BIAS)})
    assert report == LoadReport(mismatched_keys=((WORDS, (12, 4), (11, 4)), (BIAS, (12,), (11,))))
    assert str(report) == f"of another shape: {told}"


@pytest.mark.parametrize("arrays", [{}, {"transformer.wte.weight": np.zeros((3, 2))}])
def test_another_model_s_weights_are_refused(arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match="is it a BERT") as error:
        match(arrays, EXPECTED)
    assert all(name in str(error.value) for name in arrays)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "bool"])
def test_quantised_weights_are_no_weights(dtype: str) -> None:
    with pytest.raises(UserError, match=f"{WORDS} is of {dtype}, expected floats"):
        match({**FULL, WORDS: FULL[WORDS].astype(dtype)}, EXPECTED)


@pytest.mark.parametrize("backwards", [False, True])
def test_of_one_parameter_under_two_names_the_exact_one_counts(backwards: bool) -> None:
    others = {
        "embeddings.LayerNorm.bias": np.full(4, 9.0),
        "bert.embeddings.LayerNorm.beta": np.full(4, 8.0),
        f"module.{WORDS}": np.zeros((11, 4)),
    }
    arrays = {**others, **FULL} if backwards else {**FULL, **others}
    matched, report = match(arrays, EXPECTED)
    same(matched, FULL)
    assert sorted(report.unexpected_keys) == sorted(others)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model."])
def test_a_wrapper_s_prefix_is_no_part_of_a_name(prefix: str) -> None:
    matched, report = match({prefix + name: array for name, array in FULL.items()}, EXPECTED)
    same(matched, FULL)
    assert report == NOTHING


@pytest.mark.parametrize(("name", "first"), [("position_ids", 0), ("token_type_ids", None)])
def test_a_buffer_is_passed_over_only_if_it_holds_what_the_model_computes(name: str, first: int | None) -> None:
    buffer = np.zeros((1, 6), np.int64) if first is None else np.arange(6)[None]
    name = f"bert.embeddings.{name}"
    assert match({**FULL, name: buffer}, EXPECTED)[1] == NOTHING
    assert match({**FULL, name: buffer + 2}, EXPECTED)[1] == LoadReport(unexpected_keys=(name,))


def of_layers(*layers: int) -> list[str]:
    parts = [f"{module}.{kind}" for module in ("query", "key", "value", "out") for kind in ("weight", "bias")]
    return [f"bert.encoder.layer.{i}.{part}" for i in layers for part in parts]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], "a, b"),
        ([f"encoder.layer.{i}.dense.bias" for i in range(24)] + ["x"], "encoder.layer.{0...23}.dense.bias, x"),
        ([f"layer.{i}.b" for i in range(0, 64, 4)], "layer.{0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44 and 4 more}.b"),
        (of_layers(3) + of_layers(4) + list("abcdef"), "bert.encoder.layer.{3...4}.*, a, b, c, d, e, f"),
        (of_layers(7) + list("abcdef"), "bert.encoder.layer.7.*, a, b, c, d, e, f"),
        ([f"n{i}" for i in range(500)], ", ".join(f"n{i}" for i in range(12)) + " and 488 more"),
    ],
)  # fmt: skip
def test_many_names_are_told_in_few_words(names: list[str], expected: str) -> None:
    assert named(names) == expected
