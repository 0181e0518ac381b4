"""The config: what it refuses and how, what of a published config.json it passes over, and the named sizes."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError
from minibert.model.compressed import quantization_config
from minibert.model.config import ACTIVATIONS, NAMED, ONLY, BertConfig

INT8 = quantization_config(["encoder.layer.0.output.dense"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, ["hidden_size", "multiple", "10"]),
        ({"hidden_act": "silu"}, ["hidden_act", "silu", *ACTIVATIONS]),
        ({"hidden_dropout_prob": 1.0}, ["hidden_dropout_prob", "[0, 1)", "1.0"]),
        ({"attention_probs_dropout_prob": -0.1}, ["attention_probs_dropout_prob", "-0.1"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "1 or more"]),
        ({"vocab_size": -3}, ["vocab_size", "-3"]),
        ({"vocab_size": 10.0}, ["vocab_size", "int", "float"]),
        ({"vocab_size": True}, ["vocab_size", "int", "bool"]),
        ({"hidden_size": "768"}, ["hidden_size", "int", "str"]),
        ({"pad_token_id": 30522}, ["pad_token_id", "below vocab_size"]),
        ({"layer_norm_eps": float("nan")}, ["layer_norm_eps", "finite"]),
        ({"initializer_range": -1.0}, ["initializer_range"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "bool"]),
        ({"pad_token_id": -2}, ["pad_token_id", "0 or more", "-2"]),
        ({"pad_token_id": "0"}, ["pad_token_id", "int", "str"]),
        ({"num_hidden_layers": None}, ["num_hidden_layers", "int", "NoneType"]),
        ({"hidden_act": ["gelu", "linear"]}, ["hidden_act", "str", "list"]),
        ({"hidden_act": "gelu_10"}, ["hidden_act", "gelu_10", *ACTIVATIONS]),
        ({"output_hidden_states": "true"}, ["output_hidden_states", "bool", "str"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": [8] * 999}}, ["quantization_config", "gptq"]),
        ({"quantization_config": ["int8"]}, ["quantization_config", "int8"]),
        ({"quantization_config": {**INT8, "format": "pack-quantized"}}, ["quantization_config", "int-quantized"]),
        ({"quantization_config": {**INT8, "config_groups": {}}}, ["quantization_config", "int-quantized"]),
        ({"per_layer_config": {"0": {"num_attention_heads": 1}}}, ["per_layer_config"]),
        ({"position_embedding_type": None}, ["position_embedding_type", "None", "'absolute'"]),
        ({"position_embedding_type": "alibi"}, ["position_embedding_type", "'alibi'"]),
        ({"is_decoder": "no"}, ["is_decoder", "'no'"]),
        ({"model_type": "roberta"}, ["model_type", "'roberta'", "'bert'"]),
        ({"is_decoder": True}, ["is_decoder"]),
        ({"add_cross_attention": True}, ["add_cross_attention"]),
        ({"position_embedding_type": "relative_key"}, ["position_embedding_type", "'relative_key'", "'absolute'"]),
        ({"pruned_heads": {"1": [2]}}, ["pruned_heads"]),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        BertConfig.from_dict(values)
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words)
    assert len(message) < 250


# What public checkpoints bring along: Google's, classifiers', those of old versions, private notes.
PUBLISHED: dict[str, Any] = {
    "architectures": ["BertForSequenceClassification"], "id2label": {"0": "no", "1": "yes"},
    "label2id": {"no": 0, "yes": 1}, "problem_type": "single_label_classification", "classifier_dropout": None,
    "directionality": "bidi", "pooler_fc_size": 768, "pooler_type": "first_token_transform", "use_cache": True,
    "torch_dtype": "float16", "transformers_version": "4.8.2", "position_embedding_type": "absolute",
    "is_decoder": False, "add_cross_attention": None, "pruned_heads": {}, "is_encoder_decoder": False,
    "gradient_checkpointing": False, "_name_or_path": "x", "language": "de", "tokenizer_class": "BertTokenizer",
    "emb_size": 768, "output_past": True, "vocab_size_or_config_json_file": 30522, "num_labels": 2,
    "chunk_size_feed_forward": 0, "quantization_config": None, "notes": {"by": ["us", 3]}, "eos_token_ids": None,
}  # fmt: skip


def test_a_config_comes_back_with_all_that_is_beside_the_math() -> None:
    config = replace(
        NAMED["tiny"], hidden_act="relu", layer_norm_eps=1e-5, pad_token_id=None, tie_word_embeddings=False,
        output_hidden_states=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = BertConfig.from_dict({**PUBLISHED, **json.loads(json.dumps(config.to_dict()))})
    config = replace(config, id2label=["no", "yes"], problem_type="single_label_classification")
    assert found == config and hash(found) == hash(config)
    written = json.loads(json.dumps(replace(found, num_hidden_layers=3).to_dict()))
    assert written == {**PUBLISHED, **config.to_dict(), "num_hidden_layers": 3}
    assert "output_hidden_states" not in NAMED["tiny"].to_dict()  # as transformers: only where it says something


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hiden_size": 3}, ["'hiden_size'", "'hidden_size'"]),
        ({"num_hidden_layer": 3}, ["'num_hidden_layer'", "'num_hidden_layers'"]),
        ({"auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"}}, ["auto_map"]),
    ],
)
def test_keys_that_may_change_the_computation_are_told_of(values: dict[str, Any], words: list[str]) -> None:
    with pytest.warns(UserWarning, match=words[0]) as told:
        config = BertConfig.from_dict(values)
    assert config.others == values and len(told) == 1
    assert all(word in str(told[0].message) for word in words) and told[0].filename == __file__


@pytest.mark.parametrize(
    "values",
    [{}, {"hidden_size": 768, "hiden_size": 3}, {"auto_map": {}}, {"n_layer": 3}, {"output_hidden_states": None}],
)
def test_keys_that_change_nothing_are_not_told_of(values: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert BertConfig.from_dict(values) == BertConfig()


JUNK: list[Any] = [None, "x", "", [], {}, {"a": 1}, True, False, 0, 1, 1.5, -1, 10**30, math.nan, math.inf, [1] * 5000]


@pytest.mark.parametrize("key", [*(f.name for f in fields(BertConfig)), *ONLY, "auto_map", "architectures", "dtype"])
@pytest.mark.filterwarnings("ignore:config. auto_map")
def test_any_value_is_followed_or_refused_in_one_line(key: str) -> None:
    for value in JUNK:
        try:
            config = BertConfig.from_dict({key: value})
        except UserError as error:
            message = str(error)
            assert "\n" not in message and key in message and len(message) < 250
        else:
            back = BertConfig.from_dict(config.to_dict())
            assert back == config and repr(back.others) == repr(config.others)


def test_what_is_written_for_nothing_is_nothing() -> None:
    assert BertConfig.from_dict({"pad_token_id": -1}).pad_token_id is None
    assert BertConfig.from_dict({"model_type": None}).to_dict()["model_type"] == "bert"


def test_a_misspelt_keyword_in_python_is_an_error() -> None:
    with pytest.raises(TypeError, match="hiden_size"):
        BertConfig(hiden_size=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="what no field holds, got 'hidden_size'"):
        BertConfig(others={"hidden_size": 3})


def test_numbers_take_the_type_of_their_field() -> None:
    config = BertConfig(vocab_size=np.int64(50), hidden_dropout_prob=0, layer_norm_eps=np.float32(0.5))  # type: ignore[arg-type]
    assert json.dumps(config.to_dict())
    assert type(config.vocab_size) is int and type(config.hidden_dropout_prob) is float


def test_the_named_configs_are_google_s_miniatures_and_minilm() -> None:
    """Turc et al. 2019, table 1: layers / width; Wang et al. 2020, table 1: MiniLM of 6 layers."""
    axes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    sizes = {name: tuple(getattr(config, axis) for axis in axes) for name, config in NAMED.items()}
    assert sizes == {
        "tiny": (2, 128, 2, 512), "mini": (4, 256, 4, 1024), "small": (4, 512, 8, 2048), "medium": (8, 512, 8, 2048),
        "base": (12, 768, 12, 3072), "minilm": (6, 384, 12, 1536),
    }  # fmt: skip
    assert NAMED["base"] == BertConfig()


@pytest.mark.parametrize(
    ("values", "id2label"),
    [
        ({}, {}),
        ({"id2label": None}, {}),
        ({"id2label": {"1": "yes", "0": "no"}}, {0: "no", 1: "yes"}),
        ({"label2id": {"no": 0, "yes": 1}}, {0: "no", 1: "yes"}),
        ({"num_labels": 3}, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}),
        ({"num_labels": 1, "id2label": {"0": "no", "1": "yes"}}, {0: "LABEL_0"}),
        ({"id2label": {str(n): n for n in range(12)}}, {n: str(n) for n in range(12)}),
    ],
)
def test_labels_have_transformers_names(values: dict[str, Any], id2label: dict[int, str]) -> None:
    config = BertConfig.from_dict(values)
    assert config.id2label == id2label and config.num_labels == (len(id2label) or 2)
    again = BertConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert list(again.id2label.items()) == list(id2label.items()) and again == config
