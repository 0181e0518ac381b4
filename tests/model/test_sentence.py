"""Encoders of sentences: pooling, the loss over negatives in the batch, and sentence-transformers' folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert import backends
from minibert.errors import UserError
from minibert.model.losses import multiple_negatives_ranking_loss
from minibert.model.sentence import SentenceBert
from minibert.model.sentence_config import MODES, SentenceConfig, read_sentence_folder
from minibert.model.tensor import Tensor
from tests.emulator_device import needs_compiler

CONFIG = mb.BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=24,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(5, 50, (3, 7))
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])
POOLING = "1_Pooling__config_json"
NEW = "sentence_transformers.base.modules.transformer.Transformer"
NEW_POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it: cls pooling, normalised, 20 tokens of a text."""
    path = tmp_path_factory.mktemp("sentences") / "model"
    about = SentenceConfig("cls", True, 20, prompts={"query": "query: "}, others={"model_type": "SentenceTransformer"})
    SentenceBert(CONFIG, "numpy", sentence_config=about, add_pooling_layer=True).save_pretrained(path)
    return path


@pytest.fixture
def changed(folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder with other files: of an object the keys given, of anything else all of it; None: without."""

    def change(**files: Any) -> Path:
        copy = shutil.copytree(folder, tmp_path / "copy")
        for name, content in files.items():
            path = copy / name.replace("__", "/").replace("_json", ".json")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return copy

    return change


@pytest.mark.parametrize("backend", ["numba", pytest.param("emulator", marks=needs_compiler)])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooling_is_that_of_the_padded_states(pooling: str, normalize: bool, backend: str) -> None:
    model = SentenceBert(CONFIG, backend, sentence_config=SentenceConfig(pooling, normalize))
    with mb.no_grad():
        vectors = model(IDS, MASK).numpy()
        states = model.bert(IDS, MASK).last_hidden_state.numpy()
    assert vectors.shape == (3, 16) and not vectors[2].any(), "a text without tokens is zeros"
    for row, states_of, mask in zip(vectors[:2], states, MASK, strict=False):
        expected = states_of[mask == 1].mean(0) if pooling == "mean" else states_of[0]
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)


def test_a_folder_is_read_as_it_was_written(folder: Path) -> None:
    found = SentenceBert.from_pretrained(folder, "numpy")
    assert found.sentence_config == SentenceConfig(
        "cls", True, 20, prompts={"query": "query: "}, others={"model_type": "SentenceTransformer"}
    )
    model = SentenceBert(CONFIG, "numpy", sentence_config=found.sentence_config)
    with mb.no_grad():
        np.testing.assert_array_equal(found(IDS, MASK).numpy(), model(IDS, MASK).numpy())
    assert "bert.pooler.dense.weight" in found.state_dict(), "BERT's own pooler stays in the folder"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertModel"]
    written = json.loads((folder / "modules.json").read_text())
    assert [module["type"] for module in written] == [
        f"sentence_transformers.models.{kind}" for kind in ("Transformer", "Pooling", "Normalize")
    ]
    assert json.loads((folder / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 20, "do_lower_case": False,
    }  # fmt: skip


def test_the_form_of_release_6_is_read(changed: Callable[..., Path]) -> None:
    copy = changed(
        modules_json=[{"idx": 0, "path": "", "type": NEW}, {"idx": 1, "path": "1_Pooling", "type": NEW_POOLING}],
        **{POOLING: {"embedding_dimension": 16, "pooling_mode": "mean", "include_prompt": True}},
        sentence_bert_config_json={"transformer_task": "feature-extraction"},
        tokenizer_config_json={"model_max_length": 12},
    )
    found = read_sentence_folder(copy).sentence_config
    assert (found.pooling, found.normalize, found.max_seq_length) == ("mean", False, 12)


def test_no_limit_is_that_of_the_positions(changed: Callable[..., Path]) -> None:
    copy = changed(sentence_bert_config_json={"max_seq_length": 512})
    assert SentenceBert.from_pretrained(copy, "numpy").max_seq_length == 24
    (copy / "sentence_bert_config.json").unlink()
    assert SentenceBert.from_pretrained(copy, "numpy").max_seq_length == 24


def test_without_modules_what_is_assumed_is_said(changed: Callable[..., Path], recwarn: Any) -> None:
    copy = changed(modules_json=None)
    with pytest.warns(UserWarning, match=r"no modules.json: assumed is mean pooling, not normalised; give pooling and"):
        assert read_sentence_folder(copy).sentence_config.pooling == "mean"
    recwarn.clear()
    found = read_sentence_folder(copy, pooling="cls", normalize=True).sentence_config
    assert (found.pooling, found.normalize, len(recwarn)) == ("cls", True, 0)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({POOLING: None}, "no config.json in .*1_Pooling"),
        ({POOLING: {"pooling_mode_max_tokens": True}}, "pooling by max is not known here"),
        ({POOLING: dict.fromkeys(list(MODES)[:2], True)}, "pooling by cls and mean is not known here"),
        ({POOLING: {"pooling_mode": "lasttoken"}}, "pooling by lasttoken is not known here"),
        ({POOLING: {"word_embedding_dimension": 384}}, "vectors of 384 numbers, but the encoder's have 16"),
        ({POOLING: {"include_prompt": False}}, "include_prompt is false"),
        ({"modules_json": "{"}, "modules.json: expected a list of modules"),
        ({"modules_json": []}, "lists no module"),
        ({"modules_json": [{"type": "my_code.Transformer", "path": ""}]}, "names my_code.Transformer, code of its own"),
        (
            {"modules_json": [{"type": f"sentence_transformers.models.{k}", "path": ""} for k in ("Transformer", "X")]},
            "lists Transformer, X: expected Transformer, Pooling",
        ),
        ({"sentence_bert_config_json": {"max_seq_length": "many"}}, 'max_seq_length is "many"'),
        ({"sentence_bert_config_json": {"max_seq_length": 2}}, "max_seq_length of 3 tokens or more, got 2"),
        ({"config_sentence_transformers_json": {"similarity_fn_name": "euclidean"}}, "expected cosine or dot"),
        ({"config_sentence_transformers_json": {"default_prompt_name": "a"}}, "is called 'a': there are none"),
        ({"model_safetensors": None}, "no model.safetensors"),
    ],
)  # fmt: skip
def test_what_is_missing_or_unknown_is_named(files: dict[str, Any], said: str, changed: Callable[..., Path]) -> None:
    copy = changed(**{name: content for name, content in files.items() if name != "model_safetensors"})
    if "model_safetensors" in files:
        (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=said):
        SentenceBert.from_pretrained(copy, "numpy")


def test_an_encoder_that_lacks_weights_is_refused(changed: Callable[..., Path]) -> None:
    copy = changed()
    config = json.loads((copy / "config.json").read_text()) | {"num_hidden_layers": 2}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"weights of the encoder are not in the file: missing: bert.encoder.layer.1"):
        SentenceBert.from_pretrained(copy, "numpy")


def test_training_brings_what_belongs_together_nearer() -> None:
    model = SentenceBert(CONFIG, "numba", sentence_config=SentenceConfig(), add_pooling_layer=True).train()
    optimizer = mb.AdamW(model.parameters(), lr=1e-2)
    anchors, positives = np.random.default_rng(1).integers(5, 50, (2, 6, 8))
    losses = []
    for _ in range(6):
        loss = multiple_negatives_ranking_loss(model(anchors), model(positives))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_anchors_and_positives_must_be_of_one_shape() -> None:
    a, b = (Tensor(np.ones(shape), backends.get("numpy")) for shape in ((2, 3), (3, 3)))
    with pytest.raises(UserError, match="of one shape"):
        multiple_negatives_ranking_loss(a, b)


@pytest.mark.parity
@pytest.mark.parametrize("count", [2, 4])  # anchors and positives alone; with two negatives for each
def test_the_loss_over_negatives_in_the_batch_is_torch_s(count: int) -> None:
    import torch
    from torch.nn.functional import cosine_similarity, cross_entropy

    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((5, 8)) for _ in range(count)]
    ours = [Tensor(a.copy(), backends.get("numba"), requires_grad=True) for a in arrays]
    theirs = [torch.tensor(a, requires_grad=True) for a in arrays]
    loss = multiple_negatives_ranking_loss(*ours)
    expected = cross_entropy(
        20 * cosine_similarity(theirs[0][:, None], torch.cat(theirs[1:])[None], dim=-1), torch.arange(5)
    )
    loss.backward()
    expected.backward()
    np.testing.assert_allclose(loss.item(), expected.item(), rtol=1e-12)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.grad, other.grad.numpy(), rtol=1e-9, atol=1e-12)
