"""Who fine-tunes: minibert, and those of `opponents.py`.

A side prepares the batch of a step, takes the step, and gives its outputs on the rows to be judged by. Only the step is
timed. That of minibert lays its batch together too, as its trainer does; the others' batches were padded before.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.tasks.given import Given, Step, batch, model_of
from bench.tasks.opponents import SentenceTuning, TorchTuning
from bench.timing.batches import work
from minibert import backends
from minibert.backends import Backend
from minibert.tasks.embedding_task import Embed
from minibert.tasks.evaluation import batch_of, predict
from minibert.tasks.finetune import FineTuning, FineTuningConfig
from minibert.tasks.task import Prepared
from minibert.train.optim import linear_schedule

LOW_RANK = ("lora", "adalora")  # the last word in the names of sides that train low-rank updates
OPPONENTS = ("torch", *(f"peft {kind}" for kind in LOW_RANK))


class OurTuning:
    """minibert's FineTuning on one backend."""

    def __init__(self, name: str, given: Given, config: FineTuningConfig, backend: Backend) -> None:
        self.name, self.library, self.given = name, "minibert", given
        model = model_of(given, backend, config.seed)
        # Its steps are called one by one, and nothing is written: what did write would fail here.
        self.run = FineTuning(
            model, given.task, given.train, given.test, given.tokenizer, config, Path(os.devnull), new=given.new
        )
        backend.release_memory()

    @property
    def trained(self) -> int:
        return self.run.model.num_parameters(only_trainable=True)

    def steps(self) -> list[Step]:
        """All of the run; ours take themselves one by one, the others are told."""
        config, most = self.run.config, self.run.max_steps
        rates = (config.learning_rate * linear_schedule(n, config.warmup_of(most), most) for n in range(most))
        return [Step(self.run.chosen(number), rate) for number, rate in enumerate(rates)]

    def prepare(self, step: Step) -> Step:
        return step

    def step(self, step: Step) -> float:
        """One update; the loss."""
        return float(self.run.train_step()["loss"])

    def quiet(self, step: Step) -> tuple[float, float]:
        """Loss and gradient norm of a batch without dropout; nothing is updated."""
        model, optimizer = self.run.model, self.run.optimizer
        model.eval()
        loss = self.given.task.forward(model, *batch_of(self.given.task, model, self.given.train, step.chosen))[1]
        assert loss is not None
        loss.backward()
        norm = float(model.backend.numpy(optimizer.square_norm())) ** 0.5
        optimizer.zero_grad()
        model.train()
        return float(loss.item()), norm

    def outputs(self, part: Prepared) -> np.ndarray:
        """The logits of rows to be judged by, (S, K), or of their tokens, (N, K); of sentences the vectors, (S, C)."""
        return predict(self.given.task, self.run.model, part)


def low_rank(name: str) -> bool:
    """Whether a side trains low-rank updates beside a frozen model."""
    return name.split()[-1] in LOW_RANK


def make_side(name: str, given: Given, config: FineTuningConfig, place: Backend) -> Any:
    """The side of this name: one of OPPONENTS, or ours on `place`. The first values of low-rank updates are ours."""
    if name not in OPPONENTS:
        return OurTuning(name, given, config, place)
    if not low_rank(name):
        return (SentenceTuning if isinstance(given.task, Embed) else TorchTuning)(name, given, config)
    with tempfile.TemporaryDirectory() as folder:
        OurTuning(name, given, config, backends.get("numpy")).run.model.save_pretrained(folder)
        return TorchTuning(name, given, config, folder)


def step_flops(name: str, given: Given, step: Step) -> int:
    """Of the products of a side's step, over its padding where it pads.

    The backward of a layer has two products for each of its forward. Of a frozen one it has one: the weights have no
    gradient. What the low-rank updates add, a hundredth, is left out; so is that the first layer needs less.
    """
    c, outputs, laid = given.model.hidden_size, given.model.num_labels, batch(given.model, given.train, step.chosen)
    padded = name in OPPONENTS
    tokens = laid.real.size if padded else int(laid.lengths.sum())
    head = 2 * (tokens * c * outputs if given.task.of_tokens else len(step.chosen) * (c * c + c * outputs))
    if given.task.in_batch:
        head = 0  # what compares the vectors of a batch is little beside them
    encoder = work(given.model, laid, padded, "no")
    return (2 if low_rank(name) else 3) * (encoder + head)
