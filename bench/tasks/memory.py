"""Peak memory of a side, in a process of its own: what `harness.peak_bytes` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.tasks.sides import Given, Step, make_side
from bench.timing.batches import random_weights
from minibert import backends
from minibert.backends import Backend
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer
from minibert.data.sequences import Sequences
from minibert.model.config import BertConfig
from minibert.tasks.finetune import FineTuningConfig
from minibert.tasks.task import Classify, Prepared


def spec_of(given: Given, settings: Mapping[str, FineTuningConfig], place: Backend) -> dict[str, Any]:
    """What `peak` is told: the model, and a batch of the longest texts. `settings` are those of each side."""
    part = given.train
    assert part.targets is not None
    size = next(iter(settings.values())).per_device_train_batch_size
    chosen = np.argsort(part.sequences.lengths, kind="stable")[-size:]
    offsets = part.sequences.offsets
    return {
        "backends": [backends.spec_of(place)], "settings": {who: asdict(config) for who, config in settings.items()},
        "threads": given.threads, "config": given.model.to_dict(),
        "ids": [part.sequences.ids[offsets[i] : offsets[i + 1]].tolist() for i in chosen],
        "targets": part.targets[chosen].tolist(), "dtype": part.targets.dtype.name,
    }  # fmt: skip


def peak(spec: Mapping[str, Any]) -> Callable[[], Any]:
    """For `harness.peak_bytes`: what makes a step of one side, made anew, on the batch of the longest texts."""
    config = BertConfig.from_dict(spec["config"])
    names = [config.id2label[number] for number in sorted(config.id2label)]
    task, place = Classify(names, config.problem_type), backends.get(spec["backends"][0])
    offsets = np.cumsum([0, *map(len, spec["ids"])])
    ids = np.concatenate(spec["ids"]).astype(np.int32) % config.vocab_size
    lengths = np.diff(offsets).astype(np.int32)
    part = Prepared(
        None, Sequences(ids, offsets, lengths, np.arange(len(lengths), dtype=np.int32)),
        np.array(spec["targets"], spec["dtype"]), None, (),
    )  # fmt: skip
    weights = random_weights(config, 0, task.architecture)
    given = Given(task, part, part, load_tokenizer(SHIPPED_VOCABULARY), config, weights, set(), spec["threads"])
    who = spec["side"]
    settings = FineTuningConfig(**spec["settings"][who])
    side = make_side(who, given, settings, place)
    weights.clear()  # each side has a copy of its own
    place.release_memory()
    step = Step(np.arange(len(lengths)), settings.learning_rate)
    return lambda: side.step(side.prepare(step))
