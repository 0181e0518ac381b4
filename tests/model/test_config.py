"""The config: what it refuses and how, what of a published config.json it passes over, and the named sizes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minibert.errors import UserError
from minibert.model.config import ACTIVATIONS, NAMED, BertConfig


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
        ({"pad_token_id": None}, ["pad_token_id", "NoneType"]),
        ({"pad_token_id": 30522}, ["pad_token_id", "below vocab_size"]),
        ({"layer_norm_eps": float("nan")}, ["layer_norm_eps", "finite"]),
        ({"initializer_range": -1.0}, ["initializer_range"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "bool"]),
        ({"hiden_size": 3}, ["'hiden_size'", "'hidden_size'"]),
        ({"n_layer": 3}, ["'n_layer'"]),
        ({"quantization_config": {}}, ["'quantization_config'"]),
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


def test_a_config_comes_back_and_passes_over_what_is_not_math() -> None:
    config = replace(NAMED["tiny"], hidden_act="relu", layer_norm_eps=1e-5, pad_token_id=3, tie_word_embeddings=False)
    published = {  # what Google's bert-base-multilingual and a fine-tuned classifier bring along
        "architectures": ["BertForSequenceClassification"], "id2label": {"0": "a"}, "label2id": {"a": 0},
        "directionality": "bidi", "pooler_fc_size": 768, "pooler_type": "first_token_transform", "use_cache": True,
        "torch_dtype": "float32", "transformers_version": "4.8.2", "position_embedding_type": "absolute",
        "is_decoder": False, "gradient_checkpointing": False, "classifier_dropout": None, "_name_or_path": "x",
    }  # fmt: skip
    assert BertConfig.from_dict({**published, **json.loads(json.dumps(config.to_dict()))}) == config


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
