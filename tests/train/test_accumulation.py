"""Passes summed into one update: their gradient is that of one batch of the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.data import SHIPPED_TEXT, Document, PackedBatch, read_documents, train_tokenizer
from minibert.model import bert
from minibert.model.bert import BertForMaskedLM, BertForPreTraining
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE, pack
from minibert.train.config import TrainingConfig
from minibert.train.trainer import Trainer, prepare

PASSES = 4
TINY = BertConfig(
    vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
CONFIG = TrainingConfig(
    max_steps=3, tokens_per_batch=90, max_seq_length=32, gradient_accumulation_steps=PASSES, eval_tokens=64
)


@pytest.fixture(scope="module")
def text() -> tuple[list[Document], Tokenizer]:
    documents = read_documents(SHIPPED_TEXT)[:2]
    return documents, train_tokenizer(documents, TINY.vocab_size)


def make_trainer(
    text: tuple[list[Document], Tokenizer], folder: Path, backend: Any, dtype: str, **more: Any
) -> Trainer:
    config = replace(CONFIG, **more)
    kind = BertForPreTraining if config.next_sentence else BertForMaskedLM
    return Trainer(kind(TINY, backend, dtype, seed=1), prepare(*text, config), config, folder)


def gradient(run: Trainer) -> np.ndarray:
    arrays = [run.model.backend.numpy(group.grad) for group in run.optimizer.groups]
    return np.concatenate([array.astype(np.float64) for array in arrays])


def as_one(run: Trainer, batches: Sequence[PackedBatch]) -> float:
    """The loss of one batch of all sequences, given to the model itself; its gradients are with the optimiser."""

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(batch, name) for batch in batches])

    lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in batches])
    packed = pack(
        run.model.config, joined("input_ids"), token_type_ids=joined("token_type_ids"), labels=joined("labels"),
        cu_seqlens=np.cumsum([0, *lengths]),
    )  # fmt: skip
    pairs = {"next_sentence_label": joined("next_sentence_label")} if run.config.next_sentence else {}
    run.optimizer.zero_grad()
    out = run.model(packed, **pairs)
    out.loss.backward()
    return out.loss.item()


@pytest.mark.parametrize("in_parts", [False, True], ids=["head whole", "head in parts"])
@pytest.mark.parametrize("next_sentence", [False, True], ids=["one head", "both heads"])
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("numpy", "float64", 1e-13), ("numba", "float32", 3e-6), ("emulator", "bfloat16", 2**-7)],
)  # fmt: skip
def test_passes_are_one_batch(
    text: tuple[list[Document], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: str,
    tolerance: float, next_sentence: bool, in_parts: bool,
) -> None:  # fmt: skip
    """Passes predict unequal numbers of tokens, and hold unequal numbers of pairs: means of means are 10 % off."""
    try:
        backend = backends.get(name)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    if in_parts:
        monkeypatch.setattr(bert, "HEAD_ROWS", 5)
    more = {"next_sentence": next_sentence, "checkpoint_activations": in_parts}  # without, both heads are whole
    run = make_trainer(text, tmp_path, backend, dtype, **more)
    batches = [run.batches.batch(number) for number in range(PASSES)]
    predicted = [int((batch.labels != IGNORE).sum()) for batch in batches]
    pairs = [len(batch.cu_seqlens) for batch in batches]
    assert len(set(predicted)) > 1 and (len(set(pairs)) > 1 or not next_sentence), (
        "no test of weights where all are the same"
    )
    assert run.model.in_parts(np.zeros(max(predicted))) == in_parts

    loss, tokens = run.forward_backward()
    passes = gradient(run)
    assert tokens == sum(len(batch.input_ids) for batch in batches)
    assert loss == pytest.approx(as_one(run, batches), rel=max(tolerance, 1e-6))
    whole = gradient(run)
    assert np.linalg.norm(passes - whole) < tolerance * np.linalg.norm(whole)


def test_each_batch_is_made_once(
    text: tuple[list[Document], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step counts the tokens of all its passes before the first; the next step's are made while it runs."""
    run = make_trainer(text, tmp_path, "numba", "float32")
    numbers: list[int] = []
    batch = run.batches.batch
    monkeypatch.setattr(run.batches, "batch", lambda number: numbers.append(number) or batch(number))
    for step in range(CONFIG.max_steps):
        run.train_step()
        assert sorted(numbers) == list(range(min(step + 2, CONFIG.max_steps) * PASSES))
        assert len(run.made) <= PASSES
