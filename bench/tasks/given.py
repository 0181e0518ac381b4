"""What every side is given: the task, the examples, the weights; and of each step its examples and learning rate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bench.peers.torch_bert import Weights
from bench.timing.batches import Batch
from minibert.backends import Backend
from minibert.data.batching import pack as lay_together
from minibert.model.config import BertConfig
from minibert.model.sentence import SentenceBert
from minibert.tasks.embedding_task import Embed
from minibert.tasks.metrics import Figures
from minibert.tasks.task import Prepared, Task


@dataclass(frozen=True)
class Given:
    """What every side is given; the order of batches comes with the steps."""

    task: Task
    train: Prepared
    test: Prepared
    tokenizer: Tokenizer
    model: BertConfig
    weights: Weights  # of the whole model, its new head among them
    new: set[str]  # names of weights that the pretrained model had not
    threads: int
    beside: Beside | None = None


class Beside(NamedTuple):
    """Other texts that a model is judged by, and the figures of its outputs."""

    part: Prepared
    figures: Callable[[np.ndarray], Figures]


class Step(NamedTuple):
    """One update: the numbers of its examples, and how fast it learns."""

    chosen: np.ndarray
    learning_rate: float


def model_of(given: Given, backend: Backend, seed: int = 0) -> Any:
    """minibert's model with the weights that are given."""
    task = given.task
    if isinstance(task, Embed):
        pooler = any(".pooler." in name for name in given.weights)
        model: Any = SentenceBert(
            given.model, backend, seed=seed, sentence_config=task.sentence_config, add_pooling_layer=pooler,
            initialise=False,
        )  # fmt: skip
    else:
        model = task.architecture(given.model, backend, seed=seed, initialise=False)
    model.load_state_dict(dict(given.weights))
    return model


def batch(config: BertConfig, part: Prepared, chosen: np.ndarray) -> Batch:
    """The examples of these numbers, packed and padded."""
    return Batch(config, lay_together(part.sequences, part.sequences_of(chosen)))
