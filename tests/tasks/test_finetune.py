"""Fine-tuning: toys are learned, passes are one batch, labels are matched by name."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.data import load_tokenizer
from minibert.errors import UserError, pip_install
from minibert.model.checkpoint import read_config
from minibert.model.heads import BertForSequenceClassification
from minibert.model.packing import IGNORE
from minibert.tasks.batches import targets_of
from minibert.tasks.examples import TextExamples, read_texts
from minibert.tasks.finetune import FineTuning, FineTuningConfig, evaluate, freeze, layerwise_groups, load_model
from minibert.tasks.task import Classify
from tests.toy_tasks import CONFIG, SHORT, TOKENIZER, examples_of, run_of, task_of, weights

pytest.importorskip("sklearn.metrics", reason=f"needs scikit-learn: {pip_install('[tasks]')}")
pytest.importorskip("seqeval.metrics", reason=f"needs seqeval: {pip_install('[tasks]')}")

# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize(
    ("kind", "metric", "chance"),
    [("classify", "accuracy", 0.5), ("several", "f1_micro", 0.67), ("regress", "pearson", 0.0), 
     ("tag", "entity_f1", 0.2), ("answer", "f1", 0.1)],
)  # fmt: skip
def test_a_toy_is_learned(kind: str, metric: str, chance: float, toys: Path, tmp_path: Path) -> None:
    run = run_of(kind, toys, tmp_path / "run", "numba")
    records = [record for what, record in run.run() if what == "eval"]
    assert run.metric == f"eval_{metric}" and len(records) == 7
    found, loss = records[-1][run.metric], records[-1]["eval_loss"]
    assert found > 0.85 > chance + 0.15, records
    assert loss < 0.7 * records[0]["eval_loss"]
    best = type(run.model).from_pretrained(tmp_path / "run", "numpy", "float64")
    again, scores, _ = evaluate(run.task, best, run.validation)
    assert again == pytest.approx(run.progress["best"]["eval_loss"], rel=1e-4)
    assert scores.figures[metric] == pytest.approx(max(record[run.metric] for record in records[1:]), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- accumulation


def gradients(run: FineTuning) -> np.ndarray:
    return np.concatenate([run.model.backend.numpy(group.grad).ravel() for group in run.optimizer.groups])


def without_some(run: FineTuning) -> None:
    """Half of the labels do not count, and none of the first pass of step 0."""
    targets, offsets = np.array(run.train.targets), run.train.sequences.offsets
    targets[np.random.default_rng(3).random(targets.shape) < 0.5] = IGNORE
    for number in run.chosen(0)[:4]:
        rows = slice(offsets[number], offsets[number + 1]) if run.task.of_tokens else number
        targets[rows] = IGNORE
    run.train = replace(run.train, targets=targets)


@pytest.mark.parametrize(
    ("kind", "balanced", "ignored"),
    [("classify", "", False), ("classify", "balanced", False), ("classify", "", True), ("classify", "balanced", True),
     ("several", "", False), ("several", "", True), ("regress", "", False), ("tag", "", False), 
     ("tag", "balanced", False), ("tag", "", True), ("tag", "balanced", True), ("answer", "", False)],
)  # fmt: skip
def test_passes_are_one_batch(kind: str, balanced: str, ignored: bool, toys: Path, tmp_path: Path) -> None:
    found = []
    for passes in (3, 1):
        config = replace(
            CONFIG, class_weights=balanced, gradient_accumulation_steps=passes, per_device_train_batch_size=12 // passes
        )
        run = run_of(kind, toys, tmp_path, "numpy", "float64", config, model="still")
        if kind == "classify":
            run.class_weights = run.class_weights and [0.3, 1.7]
        if ignored:
            without_some(run)
        chosen = run.chosen(0)
        assert len(chosen) == 12 and len(set(run.train.sequences.lengths[chosen])) > 1
        if passes > 1:
            weighed = [run.weight(targets_of(run.task, run.train, chosen[at : at + 4])) for at in (0, 4, 8)]
            assert not ignored or weighed[0] == 0
            even = not balanced and not ignored and kind != "tag"
            assert even or len(set(weighed)) > 1, "no test of weights where all are the same"
        found.append((*run.forward_backward(), gradients(run)))
    (loss, tokens, several), (loss_of_one, tokens_of_one, one) = found
    assert loss == pytest.approx(loss_of_one, rel=1e-12) and tokens == tokens_of_one
    assert np.linalg.norm(several - one) < 1e-12 * np.linalg.norm(one)


def test_an_update_in_which_nothing_counts_changes_nothing(toys: Path, tmp_path: Path) -> None:
    run = run_of("tag", toys, tmp_path / "run", config=SHORT)
    run.train = replace(run.train, targets=np.full_like(run.train.targets, IGNORE))
    before = run.model.state_dict()
    record = run.train_step()
    assert record["loss"] == record["grad_norm"] == 0.0
    assert all(np.array_equal(before[name], array) for name, array in run.model.state_dict().items())


# ------------------------------------------------------------------------------------------------ what is trained, how


def two_layers() -> BertForSequenceClassification:
    config = mb.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8,
    )  # fmt: skip
    return BertForSequenceClassification(config, "numpy")


@pytest.mark.parametrize(
    ("what", "frozen"),
    [("embeddings", ["embeddings."]), ("layers:0", [".layer.0."]), ("layers:0-1", [".layer."]),
     ("embeddings, layers:1", ["embeddings.", ".layer.1."])],
)  # fmt: skip
def test_what_is_frozen_by_name(what: str, frozen: list[str]) -> None:
    model = two_layers()
    freeze(model, FineTuningConfig(freeze=what).freeze)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != any(part in name for part in frozen), name


@pytest.mark.parametrize("what", ["layers:2", "layers:1-2", "layers:1-0"])
def test_layers_that_are_not_there_are_not_frozen(what: str) -> None:
    with pytest.raises(UserError, match="freeze: expected layers from 0 to 1, got layers"):
        freeze(two_layers(), what)


def test_frozen_bytes_do_not_change(toys: Path, tmp_path: Path) -> None:
    run = run_of("classify", toys, tmp_path / "run", config=replace(SHORT, freeze="embeddings,layers:0"))
    before = {name: array.tobytes() for name, array in run.model.state_dict().items()}
    list(run.run())
    for name, array in run.model.state_dict().items():
        frozen = "embeddings." in name or ".layer." in name
        assert (array.tobytes() == before[name]) == frozen, name
    assert (
        weights(tmp_path / "run")["bert.embeddings.LayerNorm.weight"].tobytes()
        == (before["bert.embeddings.LayerNorm.weight"])
    )


def test_learning_rates_fall_layer_by_layer(toys: Path, tmp_path: Path) -> None:
    model = two_layers()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in layerwise_groups(model, 0.01, 0.5) for p in group["params"]}
    assert scales.keys() == set(names.values())
    for name, scale in scales.items():
        layer = [part for part in ("embeddings.", ".layer.0.", ".layer.1.") if part in name]
        assert scale == {"embeddings.": 0.125, ".layer.0.": 0.25, ".layer.1.": 0.5}[layer[0]] if layer else scale == 1
    decayed = {names[id(p)] for g in layerwise_groups(model, 0.01, 0.5) if g["weight_decay"] for p in g["params"]}
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.data.ndim > 1}

    run = run_of("classify", toys, tmp_path / "run", config=replace(SHORT, layerwise_lr_decay=0.5, weight_decay=0.0))
    before = run.model.state_dict()
    rate = run.train_step()["learning_rate"]
    moved = {name: np.abs(array - before[name]).max() for name, array in run.model.state_dict().items()}
    for name, scale in (("classifier.weight", 1), ("bert.pooler.dense.weight", 1),
                        ("bert.encoder.layer.0.output.dense.weight", 0.5),
                        ("bert.embeddings.word_embeddings.weight", 0.25)):  # fmt: skip
        assert moved[name] == pytest.approx(rate * scale, rel=1e-2), name  # Adam's first step is the learning rate


def test_rare_classes_weigh_as_much_as_frequent_ones(toys: Path, tmp_path: Path) -> None:
    run = run_of("tag", toys, tmp_path, config=replace(CONFIG, class_weights="balanced"))
    targets = np.asarray(run.train.targets)
    counts = np.bincount(targets[targets >= 0], minlength=3)
    assert run.class_weights is not None and len(set(counts)) > 1
    shares = counts * run.class_weights
    np.testing.assert_allclose(shares, shares.sum() / 3)
    for kind in ("several", "regress", "answer"):
        with pytest.raises(UserError, match="class_weights: expected one class for each example or word"):
            run_of(kind, toys, tmp_path, config=replace(CONFIG, class_weights="balanced"))


# -------------------------------------------------------------------------------------------------------- heads, labels


@pytest.fixture(scope="module")
def tuned(toys: Path) -> Path:
    """A model of two classes beside the toys, their names in an order of its own."""
    model, new = load_model(Classify(["pos", "neg"], "single_label_classification"), toys / "model", "numpy", seed=7)
    assert new == {"classifier.weight", "classifier.bias"}
    model.save_pretrained(toys / "tuned")
    for name in TOKENIZER:
        (toys / "tuned" / name).write_bytes((toys / "model" / name).read_bytes())
    return toys / "tuned"


def labelled(folder: Path, *labels: str) -> TextExamples:
    folder.mkdir(exist_ok=True)
    (folder / "some.csv").write_text("text,label\n" + "".join(f"the {label} house,{label}\n" for label in labels))
    return read_texts(folder / "some.csv", "classify")


@pytest.mark.parametrize(
    ("labels", "names", "kept"),
    [(["neg", "pos"], ["pos", "neg"], True), (["pos", "neg", "neg"], ["pos", "neg"], True),
     (["neg", "mid", "pos"], ["mid", "neg", "pos"], False), (["a", "b"], ["a", "b"], False)],
)  # fmt: skip
def test_a_head_is_kept_where_the_labels_are_its_own(
    labels: list[str], names: list[str], kept: bool, tuned: Path, tmp_path: Path
) -> None:
    task = task_of(labelled(tmp_path, *labels), tuned)
    model, new = load_model(task, tuned, "numpy", seed=8)
    assert task.names == names and bool(new) != kept
    before, now = weights(tuned), model.state_dict()
    assert np.array_equal(now["bert.pooler.dense.weight"], before["bert.pooler.dense.weight"])
    assert np.array_equal(now["classifier.weight"], before["classifier.weight"]) == kept
    assert now["classifier.weight"].shape == (len(names), 64) and now["classifier.weight"].std() > 0
    assert model.config.id2label == dict(enumerate(names))


def test_a_fine_tuned_model_is_fine_tuned_again_with_its_order_of_labels(
    toys: Path, tuned: Path, tmp_path: Path
) -> None:
    run = run_of("classify", toys, tmp_path / "run", model="tuned", config=replace(CONFIG, num_train_epochs=3))
    assert run.task.names == ["pos", "neg"]
    assert run.model.state_dict()["classifier.weight"].tobytes() == weights(tuned)["classifier.weight"].tobytes()
    assert list(run.train.targets)[:4] == [1 - int(label == "pos") for label in run.train.examples.labels[:4]]
    records = [record for kind, record in run.run() if kind == "eval"]
    assert records[-1]["eval_accuracy"] > 0.85
    config = read_config(tmp_path / "run")
    assert config.id2label == {0: "pos", 1: "neg"} and config.label2id == {"pos": 0, "neg": 1}
    assert config.problem_type == "single_label_classification"


def test_bare_numbers_are_the_labels_without_names(toys: Path, tmp_path: Path) -> None:
    for names in (["LABEL_0", "LABEL_1", "LABEL_2"], []):  # two without names are LABEL_0 and LABEL_1
        task = Classify(names, "single_label_classification")
        load_model(task, toys / "model", "numpy")[0].save_pretrained(tmp_path / "model")
        found = task_of(labelled(tmp_path, "0", "1"), tmp_path / "model")
        assert found.names == (names or ["LABEL_0", "LABEL_1"])
        assert list(found.prepare(labelled(tmp_path, "1", "0"), load_tokenizer(toys / "model"), 16).targets) == [1, 0]
        assert not load_model(found, tmp_path / "model", "numpy")[1]


def test_a_regression_keeps_the_name_of_its_number(toys: Path, tmp_path: Path) -> None:
    task = Classify(["stars"], "regression")
    load_model(task, toys / "model", "numpy")[0].save_pretrained(tmp_path / "model")
    found = task_of(examples_of("regress", toys), tmp_path / "model")
    assert (found.names, found.problem_type) == (["stars"], "regression")
    assert not load_model(found, tmp_path / "model", "numpy")[1]
    assert task_of(examples_of("regress", toys), toys / "model").names == ["LABEL_0"]


def test_evaluation_goes_by_the_names_of_labels(toys: Path, tuned: Path, tmp_path: Path) -> None:
    """Labels of a file in any order, or fewer of them: accuracy is that of the names."""
    tokenizer, model = load_tokenizer(tuned), BertForSequenceClassification.from_pretrained(tuned, "numpy")
    everything = examples_of("classify", toys)
    task = Classify(["pos", "neg"], "single_label_classification")
    _, _, logits = evaluate(task, model, task.prepare(everything, tokenizer, 32))
    said = np.array(task.names)[logits.argmax(axis=-1)]
    for label in ("pos", "neg"):
        rows = np.flatnonzero(np.array(everything.labels) == label)
        _, scores, _ = evaluate(task, model, task.prepare(everything.subset(rows), tokenizer, 32))
        assert scores.figures["accuracy"] == pytest.approx((said[rows] == label).mean())
    with pytest.raises(UserError, match=r"unknown label 'mid' in .*some.csv, line 3: the model knows pos, neg"):
        task.prepare(labelled(tmp_path, "pos", "mid"), tokenizer, 32)


# ------------------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize("setting", [
    {"num_train_epochs": 0}, {"num_train_epochs": math.nan}, {"learning_rate": math.nan}, {"learning_rate": math.inf},
    {"layerwise_lr_decay": 0}, {"layerwise_lr_decay": 1.1}, {"freeze": "head"}, {"freeze": "layers:"}, {"freeze": ","},
    {"class_weights": "equal"}, {"early_stopping_patience": 0}, {"per_device_train_batch_size": 0}, {"seed": -1},
])  # fmt: skip
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"expected {next(iter(setting))} to be "):
        FineTuningConfig(**setting)


def test_numbers_whose_square_float32_has_no_room_for_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,1\nb,-1e30\n")
    with pytest.raises(UserError, match=r"a.csv, line 3: expected a number of at most 1e\+15, got -1e\+30"):
        read_texts(tmp_path / "a.csv", "regress").targets([])


def test_sequences_longer_than_the_model_takes_are_refused(toys: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected max_seq_length of at most 48, the model's positions, got 49"):
        run_of("classify", toys, tmp_path, config=replace(CONFIG, max_seq_length=49))
