"""Contrastive training of an encoder of sentences: batches, losses, metrics, a run and the folder that it writes."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.cli import main
from minibert.data import train_tokenizer, vocabulary_size
from minibert.errors import UserError
from minibert.model.checkpoint import read_arrays
from minibert.model.losses import cosine_similarity_loss, multiple_negatives_ranking_loss
from minibert.model.sentence import SentenceBert
from minibert.model.sentence_config import SentenceConfig
from minibert.tasks import Embed, FineTuning, FineTuningConfig, SentenceTransformer, evaluate, load_model, read_texts
from minibert.tasks.embedding_task import positive_ranks, text_numbers, without_repeats
from minibert.tasks.evaluation import batch_of
from minibert.tasks.task import Prepared
from minibert.train.checkpoint import checkpoints, read_state

LEFT, RIGHT = ([f"{syllable}{end}" for syllable in ("ka", "lo", "mi", "nu", "pe", "ra")] for end in ("sto", "vin"))
CONFIG = FineTuningConfig(
    learning_rate=5e-3, num_train_epochs=4, per_device_train_batch_size=8, max_seq_length=10, save_steps=7
)
HEADER = "anchor,positive,negative"


def pairs(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Words of one kind, those that mean the same of the other, and others: what the untrained model cannot know."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        chosen, others = rng.sample(range(6), 3), rng.sample(range(6), 3)
        rows.append(tuple(" ".join(w[i] for i in n) for w, n in ((LEFT, chosen), (RIGHT, chosen), (RIGHT, others))))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and files: pairs, triplets, scored pairs."""
    made = tmp_path_factory.mktemp("embedding")
    tokenizer = train_tokenizer([[" ".join(LEFT + RIGHT)] * 3], 90)
    config = mb.BertConfig(
        vocab_size=vocabulary_size(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24, initializer_range=0.2,
    )  # fmt: skip
    about = SentenceConfig("mean", normalize=True, max_seq_length=20)
    SentenceTransformer(SentenceBert(config, "numpy", sentence_config=about), tokenizer).save_pretrained(made / "model")
    rows = pairs(64, seed=1)
    write(made / "triplets.csv", HEADER, rows)
    write(made / "pairs.csv", "anchor,positive", [row[:2] for row in rows])
    write(made / "held_out.csv", "anchor,positive", [row[:2] for row in pairs(24, seed=2)])
    scored = [(a, p, 1) if i % 2 else (a, n, 0.2) for i, (a, p, n) in enumerate(rows)]
    write(made / "scored.csv", "sentence1,sentence2,score", scored)
    return made


def write(path: Path, header: str, rows: Any) -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def prepared(folder: Path, name: str, task: Embed | None = None) -> tuple[Embed, Prepared]:
    examples = read_texts(folder / name, "embed")
    task = task or Embed.of(examples, folder / "model")
    tokenizer = SentenceTransformer.from_pretrained(folder / "model", "numpy").tokenizer
    return task, task.prepare(examples, tokenizer, CONFIG.max_seq_length)


def run_of(folder: Path, train: str, validation: str, output: Path, backend: str = "numpy", **changes: Any) -> Any:
    task, part = prepared(folder, train)
    held_out = prepared(folder, validation, task)[1]
    model, _ = load_model(task, folder / "model", backend, seed=3)
    tokenizer = SentenceTransformer.from_pretrained(folder / "model", "numpy").tokenizer
    return FineTuning(model, task, part, held_out, tokenizer, replace(CONFIG, **changes), output)


def evaluations(run: FineTuning) -> list[dict[str, Any]]:
    return [record for kind, record in run.run() if kind == "eval"]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# ------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(("texts", "size"), [(1000, 8), (40, 8), (7, 16), (3, 1)])
def test_no_batch_has_a_text_twice_and_every_example_comes_once(texts: int, size: int) -> None:
    rng = np.random.default_rng(texts)
    numbers = rng.integers(0, texts, (200, 2))
    batches = without_repeats(numbers, rng.permutation(200), size)
    assert sorted(np.concatenate(batches).tolist()) == list(range(200))
    for batch in batches:
        assert 1 <= len(batch) <= size
        found = [text for example in batch for text in set(numbers[example].tolist())]
        assert len(found) == len(set(found))
    often = max(np.unique([t for row in numbers for t in set(row.tolist())], return_counts=True)[1])
    assert len(batches) <= 2 * (often + 200 // size), "so few batches that most are full"


def test_without_repeats_the_batches_are_those_of_the_order() -> None:
    order = np.random.default_rng(0).permutation(21)
    batches = without_repeats(np.arange(42).reshape(21, 2), order, 8)
    assert [batch.tolist() for batch in batches] == [order[:8].tolist(), order[8:16].tolist(), order[16:].tolist()]


def test_texts_are_the_same_where_their_tokens_are() -> None:
    assert text_numbers(np.array([1, 2, 1, 2, 1, 2], np.int32), np.array([0, 2, 3, 5, 6])).tolist() == [0, 1, 2, 3]
    assert text_numbers(np.array([1, 2, 1, 2, 1], np.int32), np.array([0, 2, 4, 5])).tolist() == [0, 0, 1]


def test_a_run_takes_each_example_once_an_epoch_and_no_text_twice_in_a_batch(folder: Path, tmp_path: Path) -> None:
    rows = [(f"{LEFT[i % 6]} {LEFT[i % 5]}", RIGHT[i % 6]) for i in range(30)]  # each positive five times
    write(tmp_path / "repeated.csv", "anchor,positive", rows)
    (tmp_path / "model").symlink_to(folder / "model")
    run = run_of(tmp_path, "repeated.csv", "repeated.csv", tmp_path / "out", num_train_epochs=2.5)
    assert run.ends[0] >= 5 and len(run.ends) == 3
    steps = [run.chosen(step) for step in range(run.ends[1])]
    for epoch in (steps[: run.ends[0]], steps[run.ends[0] :]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(30))
        assert all(len({rows[i][1] for i in batch}) == len(batch) for batch in epoch)
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(steps, steps[run.ends[0] :], strict=False))
    assert run.max_steps == run.ends[1] + -(-(run.ends[2] - run.ends[1]) // 2)
    assert [record["epoch"] for record in evaluations(run)] == [0, 1, 2, pytest.approx(2.5, abs=0.11)]


# -------------------------------------------------------------------------------------------------- losses and metrics


@pytest.mark.parametrize("name", ["pairs.csv", "triplets.csv", "scored.csv"])
def test_the_loss_of_a_batch_is_that_of_its_texts_vectors(name: str, folder: Path) -> None:
    task, part = prepared(folder, name)
    model, _ = load_model(task, folder / "model", "numba")
    encoder = SentenceTransformer.from_pretrained(folder / "model", "numba")
    chosen = np.array([5, 3, 9])
    _, loss = task.forward(model, *batch_of(task, model, part, chosen))
    examples, backend = part.examples, model.backend
    columns = [column for column in (examples.texts, examples.pairs, examples.negatives) if column is not None]
    vectors = [mb.Tensor(backend.asarray(encoder.encode([c[i] for i in chosen])), backend) for c in columns]
    if name == "scored.csv":
        expected = cosine_similarity_loss(*vectors, [examples.labels[i] for i in chosen])
    else:
        assert len(vectors) == (3 if name == "triplets.csv" else 2)
        expected = multiple_negatives_ranking_loss(*vectors)
    assert loss is not None
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_cosine_similarity_loss() -> None:
    backend = mb.backends.get("numpy")
    rng = np.random.default_rng(0)
    a, b, scores = rng.standard_normal((5, 4)), rng.standard_normal((5, 4)), rng.uniform(-1, 1, 5)
    tensors = [mb.Tensor(backend.asarray(x), backend) for x in (a, b)]
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine_similarity_loss(*tensors, scores).item() == pytest.approx(((cosines - scores) ** 2).mean())
    with pytest.raises(UserError, match=r"of one shape \(B, C\), got \(5, 4\) and \(4, 4\)"):
        cosine_similarity_loss(tensors[0], tensors[1].slice(0, 0, 4), scores)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cosine_similarity_loss_is_torchs(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    a, b, scores = (rng.standard_normal(s).astype(dtype) for s in ((6, 8), (6, 8), (6,)))
    backend = mb.backends.get("numba")
    ours = [mb.Tensor(backend.asarray(x), backend, requires_grad=True) for x in (a, b)]
    theirs = [torch.tensor(x, requires_grad=True) for x in (a, b)]
    loss = cosine_similarity_loss(*ours, scores)
    expected = torch.nn.functional.mse_loss(torch.cosine_similarity(*theirs), torch.tensor(scores))
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x.grad, y.grad.numpy(), atol=1e-6 if dtype == "float32" else 1e-13)


def test_a_positive_is_looked_for_among_what_is_no_other_right_answer() -> None:
    """The anchor 0 has two positives, 1 and 2, and stands among the positives itself, as that of 3."""
    vectors = np.eye(4)
    numbers = np.array([[0, 1], [0, 2], [3, 0]])
    near = np.array([0.9, 0.3, 0.2, 0.1])
    anchors, positives = np.stack([near, near, near]), vectors[numbers[:, 1]]
    assert positive_ranks(numbers, anchors, positives).tolist() == [1, 1, 1]
    assert positive_ranks(np.array([[3, 1], [4, 2], [5, 0]]), anchors, positives).tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("train", "validation", "metrics", "main"),
    [
        ("pairs.csv", "held_out.csv", {"mrr_10", "recall_1"}, "mrr_10"),
        ("triplets.csv", "scored.csv", {"spearman", "pearson"}, "spearman"),
        ("scored.csv", "scored.csv", {"spearman", "pearson"}, "spearman"),
    ],
)
def test_a_learnable_set_is_learned(
    train: str, validation: str, metrics: set[str], main: str, folder: Path, tmp_path: Path
) -> None:
    run = run_of(folder, train, validation, tmp_path / "out", num_train_epochs=8)
    found = evaluations(run)
    assert {f"eval_{name}" for name in metrics} <= found[0].keys()
    assert run.metric == f"eval_{main}"
    assert max(record[run.metric] for record in found) > found[0][run.metric] + 0.2
    assert min(record["eval_loss"] for record in found) < 0.8 * found[0]["eval_loss"]
    best = SentenceTransformer.from_pretrained(tmp_path / "out", "numpy")
    assert (best.model.max_seq_length, best.config.normalize) == (CONFIG.max_seq_length, True)
    task, part = prepared(folder, validation, Embed(best.config))
    assert evaluate(task, best.model, part)[1].figures[main] == pytest.approx(run.progress["best"][run.metric])


def test_the_loss_of_an_evaluation_does_not_depend_on_its_passes(folder: Path) -> None:
    task, part = prepared(folder, "triplets.csv")
    model, _ = load_model(task, folder / "model", "numpy")
    few, many = (evaluate(task, model, part, tokens)[0] for tokens in (30, 4096))
    assert few == pytest.approx(many, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(backend: str, folder: Path, tmp_path: Path) -> None:
    def run(name: str) -> FineTuning:
        return run_of(folder, "triplets.csv", "held_out.csv", tmp_path / name, backend, num_train_epochs=2)

    whole, stopped, resumed = run("whole"), run("stopped"), run("stopped")
    losses = [record["loss"] for kind, record in whole.run() if kind == "step"]
    for kind, record in stopped.run():
        stopped.stop |= kind == "step" and record["step"] == 11
    resumed.resume(read_state(tmp_path / "stopped", FineTuningConfig))
    assert [record["loss"] for kind, record in resumed.run() if kind == "step"] == losses[11:]
    arrays = [read_arrays(tmp_path / name / "model.safetensors")[0] for name in ("whole", "stopped")]
    assert all(np.array_equal(values, arrays[1][name]) for name, values in arrays[0].items())
    assert checkpoints(tmp_path / "stopped")


def test_the_command_trains_judges_and_goes_on_by_what_it_wrote(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ("--validation", folder / "held_out.csv", "--test", folder / "scored.csv", "--learning-rate", "5e-3")
    given = ("--model", folder / "model", "--train", folder / "triplets.csv", "--output", output, "--backend", "numpy")
    assert command(monkeypatch, "finetune", "embed", *given, *options, "--pooling", "cls") == 0
    said = capsys.readouterr()
    said = said.out + said.err
    assert "text: column 'anchor', pair: column 'positive', negative: column 'negative'" in said
    assert "cls pooling, normalised; loss: the positive among all positives and negatives of a batch" in said
    assert "(by mrr_10)" in said and "spearman" in said
    assert json.loads((output / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"] is True
    assert json.loads((output / "sentence_bert_config.json").read_text())["max_seq_length"] == 20
    tested = json.loads((output / "test_results.json").read_text())
    assert command(monkeypatch, "evaluate", output, folder / "scored.csv", "--backend", "numpy", "--json",
                   tmp_path / "figures.json") == 0  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["eval_spearman"] == pytest.approx(tested["test_spearman"])
    capsys.readouterr()
    assert command(monkeypatch, "predict", output, folder / "pairs.csv", "--backend", "numpy") == 2
    assert "its vectors are made by `minibert embed`" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        (["sentence1,sentence2,score", "a,b,0.5", "a,c,4.2"], (), "line 3: expected a score from -1 to 1"),
        (["anchor,positive", "a,b", "c,b"], (), "the column 'positive' holds one text only"),
        (["anchor,positive", "a,b", "c,"], (), "line 3: the column 'positive' is empty"),
        (["text,label", "a,b", "c,d"], (), "which column is the pair?"),
        (["anchor,positive,negative,score", "a,b,c,1", "d,e,f,0"], ("--label-column", "score"), "got both"),
        (["anchor,positive", "a,b", "c,d"], ("--gradient-accumulation-steps", 2), "not each other's negatives"),
        (["anchor,positive", "a,b", "c,d"], ("--peft", "lora"), "peft: expected none with embed"),
        (["anchor,positive", "a,b", "c,d"], ("--class-weights", "balanced"), "class_weights"),
        (["anchor,positive", "a,b", "c,d"], ("--pooling", "max"), "expected mean or cls, got 'max'"),
        (["anchor,positive", "a,b", "c,d"], ("--max-seq-length", 100), "the model's positions"),
        (["anchor,positive", "a,b", "c,d"], ("--metric-for-best-model", "f1"), "expected one of loss, mrr_10"),
        (["anchor,positive", "a,b", "c,d"], ("--token-column", "anchor"), "expected with tag"),
    ],
)
def test_what_does_not_fit_ends_in_one_line(
    rows: list[str], more: tuple[Any, ...], message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    given = ("--model", folder / "model", "--train", tmp_path / "train.csv", "--output", tmp_path / "out")
    assert command(monkeypatch, "finetune", "embed", *given, "--backend", "numpy", *more) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_pooling_is_for_encoders_of_sentences(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", folder / "model", "--train", folder / "pairs.csv", "--output", tmp_path / "out")
    assert command(monkeypatch, "finetune", "classify", *given, "--pooling", "cls") == 2
    assert "--pooling: expected with embed, got it with classify" in capsys.readouterr().err
