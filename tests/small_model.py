"""A BERT so small that it is tuned in milliseconds, and a batch for it; its outputs depend on every weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import minibert as mb

CONFIG = mb.BertConfig(
    vocab_size=61, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=24, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, initializer_range=0.2,
)  # fmt: skip
QUIET = replace(CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # no dropout
IDS = np.random.default_rng(1).integers(1, 61, (3, 11))
LABELS = np.where(np.random.default_rng(2).random(IDS.shape) < 0.5, IDS, -100)


def masked_lm(backend: str = "numba", seed: int = 3, **changes: Any) -> Any:
    return mb.BertForMaskedLM(replace(CONFIG, **changes), backend=backend, seed=seed)


def logits(model: Any) -> np.ndarray:
    return model(IDS).logits.numpy()
