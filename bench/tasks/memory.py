"""Peak memory of a side, in a process of its own: what `harness.peak_bytes` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.tasks.given import Given, Step
from bench.tasks.sides import make_side
from bench.timing.batches import random_weights
from minibert import backends
from minibert.backends import Backend
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer
from minibert.data.sequences import Sequences
from minibert.model.config import BertConfig
from minibert.tasks.batches import targets_of
from minibert.tasks.finetune import FineTuningConfig
from minibert.tasks.metrics import Scores
from minibert.tasks.task import Prepared, task_of


def spec_of(given: Given, settings: Mapping[str, FineTuningConfig], place: Backend) -> dict[str, Any]:
    """What `peak` is told: the model, and a batch of the longest texts. `settings` are those of each side."""
    part = given.train
    size = next(iter(settings.values())).per_device_train_batch_size
    chosen = np.argsort(part.sequences.lengths, kind="stable")[-size:]
    offsets, targets = part.sequences.offsets, targets_of(given.task, part, chosen)
    return {
        "backends": [backends.spec_of(place)], "settings": {who: asdict(config) for who, config in settings.items()},
        "threads": given.threads, "config": given.model.to_dict(),
        "ids": [part.sequences.ids[offsets[i] : offsets[i + 1]].tolist() for i in chosen],
        "second": part.sequences.second[chosen].tolist(), "targets": targets.tolist(), "dtype": targets.dtype.name,
        "architecture": given.task.architecture.__name__,
    }  # fmt: skip


def peak(spec: Mapping[str, Any]) -> Callable[[], Any]:
    """For `harness.peak_bytes`: what makes a step of one side, made anew, on the batch of the longest texts."""
    config = BertConfig.from_dict(spec["config"])
    task, place = task_of(config, spec["architecture"]), backends.get(spec["backends"][0])
    assert task is not None
    offsets = np.cumsum([0, *map(len, spec["ids"])])
    ids = np.concatenate(spec["ids"]).astype(np.int32) % config.vocab_size
    part = Prepared(
        None,
        Sequences(ids, offsets, np.array(spec["second"], np.int32), np.arange(len(spec["ids"]), dtype=np.int32)),
        np.array(spec["targets"], spec["dtype"]), None, (),
    )  # fmt: skip
    unjudged = Scores({task.main_metric(part): None}, "")
    task.scores = lambda prepared, outputs: unjudged  # type: ignore[method-assign]  # the examples are not here
    weights = random_weights(config, 0, task.architecture)
    given = Given(task, part, part, load_tokenizer(SHIPPED_VOCABULARY), config, weights, set(), spec["threads"])
    who = spec["side"]
    # So long that AdaLoRA has not come to pruning: it does by averages over the steps before.
    settings = FineTuningConfig(**{**spec["settings"][who], "num_train_epochs": 100.0})
    side = make_side(who, given, settings, place)
    weights.clear()  # each side has a copy of its own
    place.release_memory()
    step = Step(np.arange(len(spec["ids"])), settings.learning_rate)
    return lambda: side.step(side.prepare(step))
