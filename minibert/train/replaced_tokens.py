"""Pretraining an ELECTRA: the masked language model and the detection of what it puts in, in one run.

    pair = ElectraPair(config, generator_of(config, training.generator_size), "numba", seed=training.seed)
    for kind, record in ReplacedTokenTrainer(pair, data, training, "folder").run():
        print(kind, record)

The folder has the discriminator at its top, and the generator in its folder `generator`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minibert.data import PackedBatch, save_tokenizer
from minibert.model.electra_pair import GENERATOR, ElectraPair
from minibert.model.packing import Packed
from minibert.model.tensor import Tensor, no_grad
from minibert.train.loop import Record
from minibert.train.trainer import Trainer


class ReplacedTokenTrainer(Trainer):
    """As `Trainer`, of an `ElectraPair`.

    The log has beside `loss`, the sum, `mlm_loss` of the generator, `rtd_loss` of the discriminator and `rtd_accuracy`,
    the share of tokens of which it is right.
    """

    model: ElectraPair
    eval_parts = 0  # the generator's draws are not from the middle of the whole's

    def most_parts(self) -> int:
        return 1  # for the same reason

    def second_count(self, batch: PackedBatch) -> int:
        """The discriminator's loss is the mean over all tokens."""
        return len(batch.input_ids)

    def mean_of(self, batch: PackedBatch, packed: Packed, share: float, second_share: float) -> Tensor:
        out = self.model(packed)
        generated, judged = out.generated.loss, out.judged.loss
        assert generated is not None and judged is not None
        found = {
            "mlm_loss": generated.item() * share,
            "rtd_loss": judged.item() * second_share,
            "rtd_accuracy": out.accuracy * second_share,
        }
        self.measured = {name: self.measured.get(name, 0.0) + value for name, value in found.items()}
        return generated + judged * (self.config.rtd_weight * second_share / share)

    def evaluate(self) -> Record:
        """Both losses and accuracies on the held-out text: always the same masks and draws, dropout off.

        `eval_accuracy` is the generator's on masked tokens. `eval_replaced` is the share of tokens that are not the
        text's own: who takes none for replaced is right of all others.
        """
        self.model.eval()
        sums = dict.fromkeys(("mlm_loss", "accuracy", "rtd_loss", "rtd_accuracy", "replaced"), 0.0)
        masked = tokens = 0
        with no_grad():
            for number, batch in enumerate(self.held_out):
                self.model.step = number  # names the draws
                packed = self.pack(batch, batch.labels)
                out = self.model(packed)
                assert packed.predicted is not None and out.generated.loss is not None and out.judged.loss is not None
                guessed = out.generated.logits_at(packed.predicted).numpy().argmax(axis=-1)
                m, n = len(packed.predicted), len(packed.input_ids)
                sums["mlm_loss"] += out.generated.loss.item() * m
                sums["accuracy"] += np.count_nonzero(guessed == packed.targets)
                sums["rtd_loss"] += out.judged.loss.item() * n
                sums["rtd_accuracy"] += out.accuracy * n
                sums["replaced"] += out.replaced.sum()
                masked, tokens = masked + m, tokens + n
        found: dict[str, Any] = {
            f"eval_{name}": float(total / (masked if name in ("mlm_loss", "accuracy") else tokens))
            for name, total in sums.items()
        }
        total = found["eval_mlm_loss"] + self.config.rtd_weight * found["eval_rtd_loss"]
        return {"eval_loss": total, **found, "unigram_loss": self.unigram_loss}

    def save_model(self, folder: Path) -> None:
        """Both halves, each with the tokenizer."""
        super().save_model(folder)
        save_tokenizer(self.tokenizer, folder / GENERATOR, self.model.config.max_position_embeddings)
