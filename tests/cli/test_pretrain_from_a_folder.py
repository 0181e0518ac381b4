"""`pretrain --config FOLDER`: what of the folder's weights goes on, and that the rest is not left behind in silence."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import minibert as mb
from minibert.cli import main
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY
from minibert.model.checkpoint import read_arrays, read_config, write_arrays
from minibert.model.matching import DECODER

SMALL = mb.BertConfig(
    vocab_size=8000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32, others={"language": "en"},
)  # fmt: skip
HEADS = {f"{name}.{kind}" for name in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = mb.BertForPreTraining(SMALL, backend="numpy", seed=3)
    model.save_pretrained(tmp_path / "begun", [SHIPPED_VOCABULARY])
    (tmp_path / "text.txt").write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return tmp_path / "begun"


def go_on(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    """The folder of a run of one step from those weights."""
    text, output = folder.parent / "text.txt", folder.parent / "run"
    sizes = ["--max-seq-length", "32", "--tokens-per-batch", "128", "--steps", "1", "--learning-rate", "1e-12"]
    arguments = ["pretrain", str(text), "--output", str(output), "--config", str(folder), "--backend", "numpy", *sizes]
    monkeypatch.setattr(sys, "argv", ["minibert", *arguments, *more])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return output


def test_heads_that_are_not_trained_on_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = go_on(folder, monkeypatch)
    said = capsys.readouterr()
    assert "--next-sentence goes on with it" in said.out
    assert said.err.startswith("warning: ") and len(said.err.splitlines()) == 1
    assert all(name in said.err for name in HEADS)
    assert not HEADS & read_arrays(output / "model.safetensors")[0].keys()
    assert read_config(output).others["language"] == "en"


def test_next_sentence_goes_on_with_its_head(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_arrays(folder / "model.safetensors")[0]
    after = read_arrays(go_on(folder, monkeypatch, "--next-sentence") / "model.safetensors")[0]
    assert capsys.readouterr().err == "" and before.keys() == after.keys()
    for name in HEADS:
        np.testing.assert_allclose(after[name], before[name], rtol=0, atol=1e-9, err_msg=name)


def test_shards_and_a_decoder_of_its_own_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {**read_arrays(folder / "model.safetensors")[0], DECODER: np.full((8000, 16), 0.25, np.float32)}
    (folder / "model.safetensors").unlink()
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(arrays)}
    for file in sorted(set(where.values())):
        write_arrays(folder / file, {name: array for name, array in arrays.items() if where[name] == file})
    index = {"weight_map": where}
    (folder / "model.safetensors.index.json").write_text(str(index).replace("'", '"'), encoding="utf-8")
    output = go_on(folder, monkeypatch, "--next-sentence")
    assert "not tied" in capsys.readouterr().err
    after = read_arrays(output / "model.safetensors")[0]
    np.testing.assert_allclose(after[DECODER], arrays[DECODER], rtol=0, atol=1e-9)
    assert not read_config(output).tie_word_embeddings
