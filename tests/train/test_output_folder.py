"""The folder of a run: no other run is replaced, and what is damaged in it is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minibert.cli.pretrain import MOVABLE, resumed
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, load_tokenizer, read_documents
from minibert.errors import UserError
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.train.checkpoint import checkpoints, read_state
from minibert.train.config import TrainingConfig
from minibert.train.trainer import Data, Trainer, prepare

SMALL = BertConfig(
    vocab_size=8000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=32,
)  # fmt: skip
CONFIG = TrainingConfig(max_steps=1, tokens_per_batch=64, max_seq_length=32, eval_tokens=64)


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare(read_documents(SHIPPED_TEXT)[:3], load_tokenizer(SHIPPED_VOCABULARY), CONFIG)


def trainer(data: Data, folder: Path) -> Trainer:
    return Trainer(BertForMaskedLM(SMALL, "numpy"), data, CONFIG, folder)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_through(run: Trainer) -> None:
    assert sum(kind == "step" for kind, _ in run.run()) == 1


def test_a_trainer_replaces_no_run_but_its_own(data: Data, tmp_path: Path) -> None:
    run_through(trainer(data, tmp_path))
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"not empty: go on with the run in it by --resume \(Trainer.resume\)"):
        run_through(trainer(data, tmp_path))
    assert before == contents(tmp_path)
    for checkpoint in checkpoints(tmp_path):
        shutil.rmtree(checkpoint)
    with pytest.raises(UserError, match="not empty: name another"):
        run_through(trainer(data, tmp_path))


def test_a_run_resumed_before_its_first_step_begins(data: Data, tmp_path: Path) -> None:
    run = trainer(data, tmp_path)
    run.stop = True
    assert [kind for kind, _ in run.run()] == ["eval"]
    again = trainer(data, tmp_path)
    again.resume(read_state(tmp_path))
    run_through(again)


def test_resumed_products_are_those_of_the_run_unless_named() -> None:
    given = {"backend": None, "products": None, "texts": []}
    stored = {"backend": "cupy", "products": "tf32", "texts": ["a.txt"]}
    assert resumed(stored, given, MOVABLE) == stored
    other = {**given, "backend": "numpy", "products": "float32"}
    assert resumed(stored, other, MOVABLE) == {**other, "texts": ["a.txt"]}
