"""ELECTRA folders in fine-tuning: they learn the toys, and are written under transformers' names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import minibert as mb
from minibert.data import load_tokenizer
from minibert.model.checkpoint import read_arrays
from minibert.model.electra_pair import ElectraPair, generator_of
from minibert.tasks.fill_mask import fill_mask, load_masked_lm
from minibert.tasks.finetune import freeze, layerwise_groups
from tests import toy_tasks
from tests.cli.conftest import refused as refused

ARCHITECTURES = {
    "classify": "ElectraForSequenceClassification", "tag": "ElectraForTokenClassification",
    "answer": "ElectraForQuestionAnswering",
}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The toys, and `electra`, a pair as pretraining leaves it, with their tokenizer."""
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        toy_tasks.make(folder, patch)
        config = mb.ElectraConfig(
            vocab_size=load_tokenizer(folder / "model").get_vocab_size(), embedding_size=48, hidden_size=64,
            num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, max_position_embeddings=48,
            initializer_range=0.1,
        )  # fmt: skip
        files = [folder / "model" / name for name in toy_tasks.TOKENIZER]
        ElectraPair(config, generator_of(config, 0.5), "numpy", seed=1).save_pretrained(folder / "electra", files)
        yield folder


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.filterwarnings("ignore:.*(missing|unexpected)")
def test_a_discriminator_is_fine_tuned(kind: str, toys: Path, tmp_path: Path) -> None:
    run = toy_tasks.run_of(kind, toys, tmp_path / "out", "numba", model="electra")
    evaluations = [record for what, record in run.run() if what == "eval"]
    assert evaluations[-1]["eval_loss"] < 0.7 * evaluations[0]["eval_loss"]
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["architectures"], about["model_type"]) == ([ARCHITECTURES[kind]], "electra")
    names = read_arrays(tmp_path / "out" / "model.safetensors")[0].keys()
    head = {name for name in names if not name.startswith("electra.")}
    ends = {
        "classify": {f"classifier.{layer}.{end}" for layer in ("dense", "out_proj") for end in ("weight", "bias")},
        "tag": {"classifier.weight", "classifier.bias"},
        "answer": {"qa_outputs.weight", "qa_outputs.bias"},
    }
    assert head == ends[kind]
    tuned = mb.pipeline(tmp_path / "out", backend="numpy")
    assert type(tuned.model).__name__ == ARCHITECTURES[kind]
    best = getattr(mb, ARCHITECTURES[kind]).from_pretrained(tmp_path / "out", "numpy", strict=True)
    np.testing.assert_equal(best.state_dict(), tuned.model.state_dict())


@pytest.mark.filterwarnings("ignore:.*(missing|unexpected)")
def test_commands_take_an_electra_and_its_generator(
    toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--model", toys / "electra", "--train", toys / "classify.csv", "--output", tmp_path / "out")
    quick = ("--num-train-epochs", 1, "--backend", "numpy", "--peft", "lora")
    assert toy_tasks.command(monkeypatch, "finetune", "classify", *given, *quick) == 0
    assert "model: ElectraForSequenceClassification from" in capsys.readouterr().out
    (tmp_path / "lines.txt").write_text("the good river was fine\n")
    predict = ("predict", tmp_path / "out", tmp_path / "lines.txt", "--backend", "numpy")
    assert toy_tasks.command(monkeypatch, *predict) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("pos", "neg")
    generator = load_masked_lm(toys / "electra" / "generator", "numpy")
    assert len(fill_mask(generator, load_tokenizer(toys / "electra"), "[MASK]")) == 5


def test_what_an_electra_has_not_is_said_in_a_line(toys: Path, refused: Callable[..., str]) -> None:
    electra = toys / "electra"
    with pytest.raises(mb.UserError, match=r"holds no masked-language-model head .*: name its generator, .*generator$"):
        load_masked_lm(electra, "numpy")
    with (
        pytest.warns(UserWarning, match=r"has no modules.json"),
        pytest.raises(mb.UserError, match="SentenceBert: expected a config of model_type 'bert', got 'electra'"),
    ):
        mb.SentenceTransformer.from_pretrained(electra, "numpy")
    assert "holds ElectraForPreTraining: expected a fine-tuned model" in refused("predict", electra, toys / "text.txt")
    model = mb.ElectraForSequenceClassification(mb.ElectraConfig(num_hidden_layers=1, vocab_size=9), "numpy")
    with pytest.raises(mb.UserError, match="bottleneck adapters: expected a BERT, got model_type 'electra'"):
        mb.tuning.get_peft_model(model, mb.tuning.SeqBnConfig())


def test_embeddings_and_their_projection_are_the_lowest_layer() -> None:
    config = mb.ElectraConfig(num_hidden_layers=2, vocab_size=9, hidden_size=8, num_attention_heads=2)
    model = mb.ElectraForTokenClassification(replace(config, embedding_size=4), "numpy")
    lowest = [group for group in layerwise_groups(model, 0.0, 0.5) if group["lr_scale"] == 0.5**3]
    assert sum(len(group["params"]) for group in lowest) == 5 + 2
    freeze(model, "embeddings")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 7 and "electra.embeddings_project.weight" in frozen
