"""`minibert quantize`: what it writes is used as the model was; what stays in floats follows a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import minibert as mb
from minibert.errors import UserError, pip_install
from minibert.model.quantized import int8_layers
from minibert.tasks.quantize import groups_of, load, quantize
from tests.toy_tasks import command, run_of

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")
TEXTS = ["the river was calm", "a bad film", "was it good ?"]


@pytest.fixture(scope="module")
def tuned(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    list(run_of("classify", toys, folder, "numba").run())
    return folder


def test_a_classifier_is_used_as_before(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "int8"
    assert command(monkeypatch, "quantize", tuned, "--output", output, "--sensitivity", "--texts", 8) == 0
    said = capsys.readouterr().out
    assert "encoder.layer.0.intermediate" in said and "4 products of the encoder in int8" in said
    plain, small = mb.pipeline(tuned, "numba"), mb.pipeline(output, "numba")
    assert len(int8_layers(small.model)) == 6
    assert (output / "model.safetensors").stat().st_size < (tuned / "model.safetensors").stat().st_size
    for a, b in zip(plain(TEXTS), small(TEXTS), strict=True):
        assert a["label"] == b["label"] and a["score"] == pytest.approx(b["score"], abs=0.05)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    assert command(monkeypatch, "predict", output, tmp_path / "texts.txt", "--backend", "numpy") == 0
    found = [json.loads(line)["label"] for line in capsys.readouterr().out.splitlines()]
    assert found == [one["label"] for one in plain(TEXTS)]


def test_an_encoder_of_sentences_stays_one(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mb.SentenceTransformer.from_pretrained(toys / "still", "numpy", pooling="mean", normalize=True).save_pretrained(
        tmp_path / "sentences"
    )
    assert command(monkeypatch, "quantize", tmp_path / "sentences", "--output", tmp_path / "int8") == 0
    encoders = [mb.SentenceTransformer.from_pretrained(tmp_path / name) for name in ("sentences", "int8")]
    a, b = (encoder.encode(TEXTS) for encoder in encoders)
    cosines = (a * b).sum(axis=1)
    assert (cosines > 0.99).all() and (cosines < 1 - 1e-6).any()
    assert encoders[1].config == encoders[0].config


def test_what_moves_most_stays_in_floats_until_the_budget_is_kept(tuned: Path) -> None:
    free = quantize(load(tuned, "numba"), TEXTS, sensitivity=True)
    assert len(free.int8) == 4 and free.floats == [] and set(free.alone) == set(free.int8)
    worst = max(free.alone, key=lambda group: free.alone[group])
    loaded = load(tuned, "numba")
    tight = quantize(loaded, TEXTS, budget=0.9 * free.mean)
    assert tight.floats[0] == worst and tight.mean <= 0.9 * free.mean < free.mean
    groups = groups_of(loaded.model)
    assert sorted(int8_layers(loaded.model)) == sorted(name for group in tight.int8 for name in groups[group])
    none = quantize(load(tuned, "numba"), TEXTS, budget=0.0)
    assert none.int8 == [] and none.mean == 0
    kept = quantize(load(tuned, "numba"), TEXTS, keep=["attention"])
    assert sorted(kept.floats) == ["encoder.layer.0.attention.output", "encoder.layer.0.attention.self"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keep": ["layer.7"]}, "keep: no layer is called 'layer.7': expected a part of a name as encoder.layer.0"),
        ({"texts": ["", " "]}, "expected texts to measure by"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], words: str, tuned: Path) -> None:
    with pytest.raises(UserError, match=words):
        quantize(load(tuned, "numba"), **{"texts": TEXTS, **change})


def test_folders_that_are_no_model_in_floats_are_refused_in_a_line(
    tuned: Path, toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: object) -> str:
        assert command(monkeypatch, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    output = tmp_path / "int8"
    assert command(monkeypatch, "quantize", tuned, "--output", output) == 0
    capsys.readouterr()
    assert "not empty" in refused("quantize", tuned, "--output", output)
    assert "in int8 already" in refused("quantize", output, "--output", tmp_path / "again")
    assert "no checkpoint" in refused("quantize", tmp_path / "nowhere", "--output", tmp_path / "again")
    rows = toys / "classify.csv"
    code = command(monkeypatch, "finetune", "classify", "--model", output, "--train", rows, "--output", tmp_path / "r")
    assert code == 2 and "int8 are not trained" in capsys.readouterr().err.splitlines()[-1]
