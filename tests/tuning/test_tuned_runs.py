"""A run of training over a tuned model: it is saved without its base, and goes on from its state with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, load_tokenizer, read_documents
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.train.config import TrainingConfig
from minibert.train.loop import read_state
from minibert.train.trainer import Data, Trainer, prepare
from minibert.tuning import AdaLoraConfig, DoubleSeqBnConfig, LoraConfig, get_peft_model
from tests.toy_tasks import state_file

TINY = BertConfig(
    vocab_size=8000, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=32,
)  # fmt: skip
CONFIG = TrainingConfig(
    max_steps=6, tokens_per_batch=128, max_seq_length=32, warmup_steps=1, learning_rate=5e-3, eval_tokens=300,
    logging_steps=3, eval_steps=6, save_steps=3,
)  # fmt: skip
KINDS: dict[str, Any] = {
    "lora": LoraConfig(r=2, lora_dropout=0.1),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, total_step=6, tfinal=1, lora_dropout=0.1),
    "houlsby": DoubleSeqBnConfig(dropout=0.1),
}


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare(read_documents(SHIPPED_TEXT)[:2], load_tokenizer(SHIPPED_VOCABULARY), CONFIG)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(kind: str, data: Data, tmp_path: Path) -> None:
    def run(folder: str) -> Trainer:
        return Trainer(get_peft_model(BertForMaskedLM(TINY, seed=1), KINDS[kind]), data, CONFIG, tmp_path / folder)

    whole, stopped, resumed = run("whole"), run("stopped"), run("stopped")
    digest = whole.model.base_sha256()
    losses = [record["loss"] for what, record in whole.run() if what == "step"]
    for what, record in stopped.run():
        stopped.stop |= what == "step" and record["step"] == 3
    resumed.resume(read_state(tmp_path / "stopped"))
    assert [record["loss"] for what, record in resumed.run() if what == "step"] == losses[3:]
    for name, values in whole.model.state_dict().items():
        np.testing.assert_array_equal(resumed.model.state_dict()[name], values)
    assert whole.model.base_sha256() == resumed.model.base_sha256() == digest
    held = {name for name in load_file(state_file(tmp_path / "whole")) if name.startswith("model.")}
    assert held == {f"model.{name}" for name in whole.model.state_dict()}, "the base is in the state"
    if kind == "adalora":
        assert sum(whole.model.ranks().values()) == 2 * len(whole.model.layers)
