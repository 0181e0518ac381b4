"""Who pretrains: minibert's Trainer, packed, and transformers' BertForMaskedLM under torch, padded.

A side prepares a step by its number, takes it at a learning rate, and tells its loss on the held-out masked tokens. The
batches of both are those of the Trainer. Ours lays them in the step that is timed, torch's were padded before it.
"""

from __future__ import annotations

import os
from typing import Any

from bench.peers.torch_bert import TorchTraining, Weights, fused_adamw
from bench.timing.batches import Batch, work
from bench.timing.frame import ours_in
from minibert.backends import Backend
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.train.config import TrainingConfig
from minibert.train.trainer import Data, Trainer

ENDLESS = 2**31  # steps: the time ends a run


class Ours:
    """minibert's Trainer, called step by step; nothing is written: what did write would fail here."""

    def __init__(
        self, config: BertConfig, weights: Weights, data: Data, settings: TrainingConfig, place: Backend,
        dtype: str = "float32", name: str = "",
    ) -> None:  # fmt: skip
        self.name, self.library = name or place.name, ours_in(dtype)
        model = BertForMaskedLM(config, place, dtype, initialise=False)
        model.load_state_dict(dict(weights))
        self.trainer = Trainer(model, data, settings, os.devnull)

    def prepare(self, batch: Batch) -> None:
        """Its Trainer makes its batches itself."""

    def step(self, prepared: None, learning_rate: float) -> None:
        """One update, as `Trainer.train_step` but for the schedule."""
        self.trainer.optimizer.lr = learning_rate
        self.trainer.update()
        self.trainer.progress["step"] += 1

    def quiet(self) -> tuple[float, float]:
        """Loss and gradient norm of the first batch without dropout; nothing is updated."""
        model, optimizer = self.trainer.model, self.trainer.optimizer
        model.eval()
        loss = model(self.trainer.packed(0)[0][1], return_dict=True).loss
        loss.backward()
        norm = float(model.backend.numpy(optimizer.square_norm())) ** 0.5
        optimizer.zero_grad()
        return float(loss.item()), norm

    def held_out_loss(self) -> float:
        return float(self.trainer.evaluate()["eval_loss"])

    def flops(self, batch: Batch) -> int:
        """Of the products of a step: the backward has two for each of the forward."""
        return 3 * work(self.trainer.model.config, batch, False, "predicted")


class Torch:
    """BertForMaskedLM of transformers and fused AdamW, with the settings that the Trainer of ours has."""

    def __init__(self, weights: Weights, ours: Trainer, threads: int, bfloat16: bool = False) -> None:
        self.ours, self.config, settings = ours, ours.model.config, ours.config
        self.training = TorchTraining(self.config, weights, threads, plain=False, bfloat16=bfloat16)
        self.name = self.training.name
        self.library, self.torch = self.training.library, self.training.torch
        self.torch.manual_seed(settings.seed)
        self.training.optimizer, self.training.parameters = fused_adamw(
            self.training.model, settings.weight_decay, eps=settings.adam_epsilon,
            betas=(settings.adam_beta1, settings.adam_beta2),
        )  # fmt: skip

    def prepare(self, batch: Batch) -> dict[str, Any]:
        return self.training.prepare(batch)

    def step(self, prepared: dict[str, Any], learning_rate: float) -> None:
        for group in self.training.optimizer.param_groups:
            group["lr"] = learning_rate
        self.training.step(prepared)

    def quiet(self) -> tuple[float, float]:
        return self.training.quiet(self.prepare(Batch(self.config, self.ours.batches.batch(0))))

    def held_out_loss(self) -> float:
        model, total, count = self.training.model, 0.0, 0
        model.eval()
        autocast = self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.training.bfloat16)
        with self.torch.inference_mode(), autocast:
            for batch in (Batch(self.config, flat) for flat in self.ours.held_out):
                total += float(model(**self.prepare(batch)).loss) * batch.predicted
                count += batch.predicted
        model.train()
        return total / count

    def flops(self, batch: Batch) -> int:
        return 3 * work(self.config, batch, True, "every")
