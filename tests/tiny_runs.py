"""Runs of pretraining that take milliseconds, and all that one leaves, to be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from minibert.data import SHIPPED_TEXT, read_documents, train_tokenizer
from minibert.model.bert import BertForMaskedLM
from minibert.model.checkpoint import read_arrays
from minibert.train.checkpoint import LOCK, read_state
from minibert.train.config import OptimizationConfig, TrainingConfig
from minibert.train.log import LOG, read_log
from minibert.train.trainer import Data, Trainer, prepare
from minibert.tuning import get_peft_model
from tests.small_steps import TINY

CONFIG = TrainingConfig(
    max_steps=3, tokens_per_batch=64, max_seq_length=32, eval_tokens=64, logging_steps=1, eval_steps=2, save_steps=1,
    save_total_limit=1,
)  # fmt: skip
MODEL = replace(TINY, vocab_size=300)


def tiny_data() -> Data:
    documents = read_documents(SHIPPED_TEXT)[:2]
    return prepare(documents, train_tokenizer(documents, 300), CONFIG)


def trainer(
    data: Data, folder: Path, backend: str = "numpy", dtype: str = "float32", peft: Any = None, **changes: Any
) -> Trainer:  # fmt: skip
    config = replace(CONFIG, **changes)
    model = BertForMaskedLM(MODEL, backend, dtype, config.seed)
    return Trainer(get_peft_model(model, peft) if peft else model, data, config, folder)


def resumed(data: Data, folder: Path, **changes: Any) -> Trainer:
    run = trainer(data, folder, **changes)
    run.resume(read_state(folder))
    return run


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: untimed(v) if isinstance(v, dict) else v for name, v in values.items() if "second" not in name}


def result(folder: Path, kind: type[OptimizationConfig] = TrainingConfig) -> tuple[Any, ...]:
    """All that a run leaves, but for times: weights and moments, how far it came, its log, the model at the top."""
    state = read_state(folder, kind)
    files = {path.name: content(path) for path in folder.iterdir() if path.is_file() and path.name not in (LOG, LOCK)}
    return as_bytes(state.arrays), untimed(state.progress), [untimed(record) for record in read_log(folder)], files


def content(path: Path) -> Any:
    """What a file says: the library writes the metadata of safetensors in a random order."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    arrays, metadata = read_arrays(path)
    return as_bytes(arrays), metadata


def as_bytes(arrays: Mapping[str, np.ndarray]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}
