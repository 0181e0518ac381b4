"""Who fine-tunes: minibert, and transformers with torch, with peft where low-rank updates are asked for.

A side prepares the batch of a step, takes the step, and gives its outputs on the rows to be judged by. Only the step is
timed. That of minibert lays its batch together too, as its trainer does; the others' batches were padded before.
"""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bench.peers.torch_bert import Weights, fused_adamw, load, tensors, transformers_bert
from bench.timing.batches import Batch, work
from minibert import backends
from minibert.backends import Backend
from minibert.data.batching import pack as lay_together
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE
from minibert.tasks.batches import targets_of
from minibert.tasks.evaluation import batch_of, in_order, predict
from minibert.tasks.finetune import FineTuning, FineTuningConfig
from minibert.tasks.task import Answer, Prepared, Task
from minibert.train.optim import linear_schedule

LORA = " lora"  # ends the names of sides that train low-rank updates
OPPONENTS = ("torch", "peft lora")


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


class Step(NamedTuple):
    """One update: the numbers of its examples, and how fast it learns."""

    chosen: np.ndarray
    learning_rate: float


class OurTuning:
    """minibert's FineTuning on one backend."""

    def __init__(self, name: str, given: Given, config: FineTuningConfig, backend: Backend) -> None:
        self.name, self.library, self.given = name, "minibert", given
        model = given.task.architecture(given.model, backend, seed=config.seed, initialise=False)
        model.load_state_dict(dict(given.weights))
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

    def outputs(self) -> np.ndarray:
        """The logits of the rows to be judged by, (S, K), or of their tokens, (N, K)."""
        return predict(self.given.task, self.run.model, self.given.test)


class TorchTuning:
    """transformers' model under torch: sdpa, fused AdamW with the same groups, gradients set to None, padded batches.

    With `adapter`, the folder of a LoRA adapter, that of peft beside a frozen model.
    """

    def __init__(self, name: str, given: Given, config: FineTuningConfig, adapter: str | None = None) -> None:
        import torch

        torch.set_num_threads(given.threads)
        torch.set_float32_matmul_precision("highest")
        torch.manual_seed(config.seed)
        self.torch, self.name, self.given, self.config = torch, name, given, config
        self.model, self.library = transformers_bert(given.model, given.task.architecture.__name__)
        load(self.model, given.weights)
        if adapter is not None:
            import peft

            self.model = peft.PeftModel.from_pretrained(self.model, adapter, is_trainable=True)
            self.library += f", peft {peft.__version__}"
        self.model.train()
        self.optimizer, self.parameters = fused_adamw(
            self.model, config.weight_decay, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon
        )

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def inputs(self, part: Prepared, chosen: np.ndarray) -> dict[str, Any]:
        """Padded to the longest of the batch."""
        laid = batch(self.given.model, part, chosen)
        kinds = laid.padded["token_type_ids"]
        beside = {**({"token_type_ids": kinds} if kinds.any() else {}), **labels(self.given.task, part, chosen, laid)}
        return {**tensors(laid), **{name: self.torch.from_numpy(array) for name, array in beside.items()}}

    def prepare(self, step: Step) -> tuple[float, dict[str, Any]]:
        return step.learning_rate, self.inputs(self.given.train, step.chosen)

    def loss(self, inputs: dict[str, Any]) -> Any:
        """transformers' own; of answers over real tokens alone, as ours: its own has the padding in the softmax."""
        if not isinstance(self.given.task, Answer):
            return self.model(**inputs).loss
        out = self.model(**{name: array for name, array in inputs.items() if not name.endswith("positions")})
        pad = self.real(inputs).logical_not()
        entropy = self.torch.nn.functional.cross_entropy
        ends = ((out.start_logits, "start_positions"), (out.end_logits, "end_positions"))
        start, end = (entropy(logits.masked_fill(pad, -math.inf), inputs[name]) for logits, name in ends)
        return (start + end) / 2

    def real(self, inputs: dict[str, Any]) -> Any:
        """(B, T): False on padding."""
        return inputs.get("attention_mask", self.torch.ones_like(inputs["input_ids"])) != 0

    def step(self, prepared: tuple[float, dict[str, Any]]) -> float:
        """One update; the loss."""
        learning_rate, inputs = prepared
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.loss(inputs)
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def quiet(self, step: Step) -> tuple[float, float]:
        """Loss and gradient norm of a batch without dropout; nothing is updated."""
        self.model.eval()
        loss = self.loss(self.prepare(step)[1])
        loss.backward()
        norm = self.torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        return float(loss.detach()), float(norm)

    def outputs(self) -> np.ndarray:
        """As those of minibert."""
        self.model.eval()
        found = []
        with self.torch.inference_mode():
            for chosen in in_order(self.given.test.lengths, self.config.tokens_per_batch):
                inputs = self.inputs(self.given.test, chosen)
                out = self.model(**inputs)
                ends = isinstance(self.given.task, Answer)
                logits = self.torch.stack([out.start_logits, out.end_logits], dim=-1) if ends else out.logits
                found.append((logits[self.real(inputs)] if self.given.task.of_tokens else logits).numpy())
        return np.concatenate(found)


def low_rank(name: str) -> bool:
    """Whether a side trains low-rank updates beside a frozen model."""
    return name.endswith(LORA)


def make_side(name: str, given: Given, config: FineTuningConfig, place: Backend) -> Any:
    """The side of this name: one of OPPONENTS, or ours on `place`. The first values of low-rank updates are ours."""
    if name not in OPPONENTS:
        return OurTuning(name, given, config, place)
    if not low_rank(name):
        return TorchTuning(name, given, config)
    with tempfile.TemporaryDirectory() as folder:
        OurTuning(name, given, config, backends.get("numpy")).run.model.save_pretrained(folder)
        return TorchTuning(name, given, config, folder)


def labels(task: Task, part: Prepared, chosen: np.ndarray, laid: Batch) -> dict[str, np.ndarray]:
    """The targets of some examples as transformers' model of this task takes them."""
    targets = targets_of(task, part, chosen)
    if isinstance(task, Answer):
        return {"start_positions": targets[:, 0], "end_positions": targets[:, 1]}
    if not task.of_tokens:
        return {"labels": targets}
    padded = np.full(laid.real.shape, IGNORE, np.int64)
    padded[laid.real] = targets
    return {"labels": padded}


def batch(config: BertConfig, part: Prepared, chosen: np.ndarray) -> Batch:
    """The examples of these numbers, packed and padded."""
    return Batch(config, lay_together(part.sequences, chosen))


def step_flops(name: str, given: Given, step: Step) -> int:
    """Of the products of a side's step, over its padding where it pads.

    The backward of a layer has two products for each of its forward. Of a frozen one it has one: the weights have no
    gradient. What the low-rank updates add, a hundredth, is left out; so is that the first layer needs less.
    """
    c, outputs, laid = given.model.hidden_size, given.model.num_labels, batch(given.model, given.train, step.chosen)
    padded = name in OPPONENTS
    tokens = laid.real.size if padded else int(laid.lengths.sum())
    head = 2 * (tokens * c * outputs if given.task.of_tokens else len(step.chosen) * (c * c + c * outputs))
    encoder = work(given.model, laid, padded, "no")
    return (2 if low_rank(name) else 3) * (encoder + head)
