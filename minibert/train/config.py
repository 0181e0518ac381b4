"""What a training run is made of, one comment of reason per field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import get_args, get_type_hints

from minibert.errors import UserError

SAVE_ERRORS = ("report", "fatal")  # of a checkpoint before the last, whose failure always ends the run
OBJECTIVES = ("mlm", "rtd")  # masked language model; replaced-token detection


@dataclass(frozen=True)
class OptimizationConfig:
    """What every training run is made of, under the names of Hugging Face's TrainingArguments where it has one.

    Raises UserError where a value is of the wrong type or out of range.
    """

    gradient_accumulation_steps: int = 1  # passes summed into one update, for batches beyond memory
    max_seq_length: int = 128  # where sequences are cut: attention costs its square, and sentences are short
    learning_rate: float = 1e-3  # at its highest; small models take more than the 1e-4 of BERT base
    warmup_ratio: float = 0.1  # share of the steps: the first second moments are poor estimates, full steps go astray
    warmup_steps: int | None = None  # where given, instead of warmup_ratio; 0 is no warm-up
    weight_decay: float = 0.01  # on matrices, as BERT
    adam_beta1: float = 0.9
    adam_beta2: float = 0.98  # RoBERTa's: a memory of 50 steps; the usual 0.999 outlasts the warm-up of a short run
    adam_epsilon: float = 1e-6  # BERT's; rows of rare words have tiny second moments
    max_grad_norm: float = 1.0  # as BERT
    logging_steps: int = 10
    save_steps: int = 500
    save_total_limit: int = 2  # checkpoints kept: where the newest is damaged, there is one before it
    save_errors: str = "report"  # a checkpoint that cannot be written is reported; "fatal": and ends the run
    checkpoint_activations: bool = False  # backward computes each layer again: memory for a third more time
    seed: int = 0  # of weights, order, masks and dropout

    def __post_init__(self) -> None:
        for name, expected in get_type_hints(type(self)).items():
            value, kinds = getattr(self, name), get_args(expected) or (expected,)
            if float in kinds and type(value) is not bool and isinstance(value, Real):  # NumPy's too
                object.__setattr__(self, name, float(value))
            elif int in kinds and type(value) is not bool and isinstance(value, Integral):
                object.__setattr__(self, name, int(value))
            elif type(value) not in kinds:
                told = getattr(expected, "__name__", str(expected))
                raise UserError(f"expected {name} to be {told}, got {value!r}")
        self._at_least_1(
            "gradient_accumulation_steps", "max_seq_length", "logging_steps", "save_steps", "save_total_limit"
        )
        for name in ("learning_rate", "adam_epsilon", "max_grad_norm"):
            self._require(getattr(self, name) > 0, name, "above 0")
        for name in ("adam_beta1", "adam_beta2"):
            self._require(0 <= getattr(self, name) < 1, name, "in [0, 1)")
        self._require(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more")
        self._require(self.learning_rate < math.inf, "learning_rate", "finite")
        self._require(self.warmup_steps is None or self.warmup_steps >= 0, "warmup_steps", "0 or more")
        self._require(0 <= self.warmup_ratio <= 1, "warmup_ratio", "from 0 to 1")
        self._require(self.save_errors in SAVE_ERRORS, "save_errors", " or ".join(SAVE_ERRORS))
        self._require(0 <= self.seed < 2**32, "seed", f"from 0 to {2**32 - 1}")

    def warmup_of(self, max_steps: int) -> int:
        """Steps in which the learning rate rises, of so many."""
        return round(self.warmup_ratio * max_steps) if self.warmup_steps is None else self.warmup_steps

    def _at_least_1(self, *names: str) -> None:
        for name in names:
            self._require(getattr(self, name) >= 1, name, "1 or more")

    def _require(self, holds: bool, name: str, expected: str) -> None:
        if not holds:
            raise UserError(f"expected {name} to be {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class TrainingConfig(OptimizationConfig):
    """How a model is pretrained."""

    objective: str = "mlm"  # or "rtd": a discriminator finds the tokens that a small masked language model put in
    generator_size: float = 0.25  # with rtd, the generator's width by the discriminator's: half of it learned less well
    rtd_weight: float = 50.0  # with rtd, of the discriminator's loss, which is small: it has two answers, not thousands
    max_steps: int = 1000  # updates; the learning rate reaches 0 after the last
    tokens_per_batch: int = 2048  # packed tokens of one forward pass: a budget, filled with sequences of mixed length
    mlm_probability: float = 0.15  # as BERT
    whole_word_mask: bool = False  # all pieces of a word or none: a piece is easily guessed from the others
    next_sentence: bool = False  # RoBERTa found that this second task does not help
    held_out: float = 0.05  # share of the text, in whole documents, that is never trained on
    eval_tokens: int = 50_000  # of the held-out text, the same at each evaluation: about 7000 predictions
    eval_steps: int = 250
    graph: bool = False  # replay steps as CUDA graphs: a launch from Python costs more than a small kernel

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_1("max_steps", "tokens_per_batch", "eval_tokens", "eval_steps")
        for name in ("mlm_probability", "held_out"):
            self._require(0 < getattr(self, name) < 1, name, "between 0 and 1")
        self._require(self.objective in OBJECTIVES, "objective", " or ".join(OBJECTIVES))
        self._require(0 < self.generator_size <= 1, "generator_size", "above 0, and 1 at most")
        self._require(0 < self.rtd_weight < math.inf, "rtd_weight", "above 0")
        if self.objective == "rtd":
            for name in ("next_sentence", "graph"):
                self._require(not getattr(self, name), name, "False with the objective rtd")
        alone = self.gradient_accumulation_steps == 1 and not self.next_sentence
        self._require(alone or not self.graph, "graph", "False with gradient accumulation or next_sentence")

    @property
    def warmup(self) -> int:
        """Steps in which the learning rate rises."""
        return self.warmup_of(self.max_steps)
