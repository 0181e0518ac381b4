"""ELECTRA: what its config and its folders say, what its classes refuse, and what its heads count."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.model.checkpoint import read_arrays, read_config

CONFIG = mb.ElectraConfig(
    vocab_size=40, embedding_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
    max_position_embeddings=12, initializer_range=0.3,
)  # fmt: skip
IDS = np.random.default_rng(1).integers(1, 40, (4, 9))
LENGTHS = np.array([9, 4, 6, 1])
MASK = (np.arange(9) < LENGTHS[:, None]).astype(int)
PACKED = {"input_ids": IDS[MASK == 1], "cu_seqlens": np.concatenate([[0], np.cumsum(LENGTHS)])}
CLASSES = (
    mb.ElectraForMaskedLM, mb.ElectraForPreTraining, mb.ElectraForQuestionAnswering,
    mb.ElectraForSequenceClassification, mb.ElectraForTokenClassification,
)  # fmt: skip


def test_the_discriminators_loss_is_the_mean_over_all_tokens_that_have_a_label() -> None:
    model = mb.ElectraForPreTraining(CONFIG, "numpy", "float64", seed=2)
    replaced = np.random.default_rng(3).integers(0, 2, IDS.shape)
    replaced[0, :2] = -100
    out = model(IDS, MASK, labels=replaced)
    assert out.logits.shape == IDS.shape
    kept = (MASK == 1) & (replaced >= 0)
    z, t = out.logits.numpy()[kept], replaced[kept]
    assert out.loss.item() == pytest.approx(
        (np.log1p(np.exp(-z)) * t + np.log1p(np.exp(z)) * (1 - t)).mean(), rel=1e-12
    )
    packed = model(**PACKED, labels=replaced[MASK == 1])
    assert packed.logits.shape == (LENGTHS.sum(),) and packed.loss.item() == pytest.approx(out.loss.item(), rel=1e-12)
    with pytest.raises(mb.UserError, match=r"labels: 2 is out of range; expected 0 .. 1"):
        model(IDS, MASK, labels=np.full(IDS.shape, 2))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("embedding_size", [12, 16])
def test_a_folder_holds_every_weight_under_transformers_names(cls: Any, embedding_size: int, tmp_path: Path) -> None:
    model = cls(replace(CONFIG, embedding_size=embedding_size), "numpy", seed=3)
    model.save_pretrained(tmp_path)
    about, arrays = json.loads((tmp_path / "config.json").read_text()), read_arrays(tmp_path / "model.safetensors")[0]
    assert (about["model_type"], about["embedding_size"]) == ("electra", embedding_size)
    assert about["architectures"] == [cls.__name__] and read_config(tmp_path) == model.config
    assert ("electra.embeddings_project.weight" in arrays) == (embedding_size == 12)
    assert not any("pooler" in name or "decoder" in name or name == "generator_lm_head.weight" for name in arrays)
    again, info = cls.from_pretrained(tmp_path, "numpy", strict=True, output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_equal(again.state_dict(), model.state_dict())


def test_a_discriminator_serves_as_the_encoder_of_another_head(tmp_path: Path) -> None:
    model = mb.ElectraForPreTraining(CONFIG, "numpy", seed=3)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"missing: classifier.dense.weight.*unexpected: discriminator_predictions"):
        tuned = mb.ElectraForSequenceClassification.from_pretrained(tmp_path, "numpy", num_labels=3)
    np.testing.assert_array_equal(
        tuned(IDS, MASK, output_hidden_states=True).hidden_states[-1].numpy(),
        model(IDS, MASK, output_hidden_states=True).hidden_states[-1].numpy(),
    )
    with pytest.warns(UserWarning, match="unexpected: discriminator_predictions"):
        bare = mb.ElectraModel.from_pretrained(tmp_path, "numpy")
    assert bare(IDS).last_hidden_state.shape == (*IDS.shape, 16) and tuned.base_model is tuned.electra


def test_a_decoder_of_its_own_is_kept_untied(tmp_path: Path) -> None:
    model = mb.ElectraForMaskedLM(replace(CONFIG, tie_word_embeddings=False), "numpy", seed=3)
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**about, "tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="generator_lm_head.weight is not the word embedding, so they are not tied"):
        again = mb.ElectraForMaskedLM.from_pretrained(tmp_path, "numpy")
    np.testing.assert_array_equal(again(IDS).logits.numpy(), model(IDS).logits.numpy())


@pytest.mark.parametrize("cls", CLASSES)
def test_dropout_is_drawn_by_step(cls: Any) -> None:
    model = cls(CONFIG, "numpy", seed=3).train()
    key = "start_logits" if cls is mb.ElectraForQuestionAnswering else "logits"

    def logits(step: int) -> np.ndarray:
        model.step = step
        return model(IDS, MASK)[key].numpy()

    assert np.array_equal(logits(4), logits(4)) and not np.array_equal(logits(4), logits(5))


def test_a_bert_and_an_electra_are_told_apart(tmp_path: Path) -> None:
    bert = mb.BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(mb.UserError, match="config of model_type 'electra', got 'bert': take BertForMaskedLM"):
        mb.ElectraForMaskedLM(bert, "numpy")
    mb.ElectraForMaskedLM(CONFIG, "numpy").save_pretrained(tmp_path)
    with pytest.raises(mb.UserError, match="config of model_type 'bert', got 'electra': take ElectraForMaskedLM"):
        mb.BertForMaskedLM.from_pretrained(tmp_path, "numpy")
    with pytest.raises(mb.UserError, match="embedding_size to be 1 or more, got 0"):
        replace(CONFIG, embedding_size=0)
    with pytest.raises(mb.UserError, match="this is ELECTRA with position_embedding_type 'absolute' only"):
        mb.ElectraConfig.from_dict({"position_embedding_type": "relative_key"})
