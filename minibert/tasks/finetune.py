"""Fine-tuning: a task's model trained on labelled examples, evaluated after each epoch, the best of them kept.

train = read_texts("reviews.csv", "classify")
task = Classify.of(train)
tokenizer = load_tokenizer("folder")
model = load_model(task, "folder", "numba")
config = FineTuningConfig(num_train_epochs=3)
data = [task.prepare(examples, tokenizer, config.max_seq_length) for examples in (train, validation)]
for kind, record in FineTuning(model, task, *data, tokenizer, config, "output").run():
    print(kind, record)
"""

from __future__ import annotations

import math
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from minibert.backends import Backend
from minibert.data import SHUFFLE_STREAM, check_vocabulary, save_tokenizer
from minibert.data.batching import pack as packed_sequences
from minibert.data.masking import shuffled
from minibert.errors import UserError
from minibert.kernels.philox import Stream
from minibert.model.checkpoint import has_weights, read_config, write_atomically, write_config
from minibert.model.matching import LoadReport
from minibert.model.pretrained import PreTrained
from minibert.tasks.batches import targets_of
from minibert.tasks.embedding_task import Embed
from minibert.tasks.evaluation import evaluate, figure_names, in_parts, predict
from minibert.tasks.examples import REGRESSION
from minibert.tasks.labels import LabelIds
from minibert.tasks.task import Classify, Prepared, Task, architecture_of, label_names, most_tokens, own_names, task_of
from minibert.train.checkpoint import model_files
from minibert.train.config import OptimizationConfig
from minibert.train.failed_step import FailedStep
from minibert.train.loop import Loop, Record, State
from minibert.train.optim import AdamW, parameter_groups
from minibert.train.parts import PARTS
from minibert.tuning import (
    AdaLoraConfig,
    DoubleSeqBnConfig,
    LoraConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    TunedModel,
    get_peft_model,
)

PEFT = ("lora", "adalora", "houlsby", "pfeiffer", "prefix")
PEFT_SETTINGS = {  # which of them heed what
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "target_modules"), ("lora", "adalora")),
    "num_virtual_tokens": ("prefix",),
}
LAYER = re.compile(r"\.layer\.(\d+)\.")
# What pretraining leaves, and some tasks have no use for.
LEFT_BEHIND = re.compile(r"cls\.|(bert\.)?pooler\.|discriminator_predictions\.|generator_")
EMBEDDINGS = re.compile(r"(\w+\.)?embeddings(_project)?\.")
FROZEN = re.compile(r"(embeddings)|layers:(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class FineTuningConfig(OptimizationConfig):
    """How a model is fine-tuned; the defaults are Hugging Face's Trainer's, but for the warm-up and 16 a batch."""

    learning_rate: float = 5e-5
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    num_train_epochs: float = 3.0  # passes over the examples
    per_device_train_batch_size: int = 16  # examples of one forward pass
    tokens_per_batch: int = 4096  # of one forward pass in evaluation
    layerwise_lr_decay: float = 1.0  # factor of the learning rate from each layer to the one below it
    freeze: str = ""  # what is not trained: embeddings, layers:0-3, or both, separated by a comma
    class_weights: str = ""  # "balanced": each class weighs the same, however rare; "": each example
    early_stopping_patience: int | None = None  # evaluations without a better one after which it ends
    metric_for_best_model: str = ""  # a metric, or eval_loss; "": the task's own
    peft: str = ""  # one of PEFT: the model is frozen, and little beside it is trained; "": all of it
    lora_r: int = 8  # rank of an update; with adalora on average, in the end
    lora_alpha: float = 16.0  # of the updates' factor, lora_alpha / r
    lora_dropout: float = 0.0
    target_modules: str = "query,value"  # what has an update: ends of names of linear layers, or all-linear
    num_virtual_tokens: int = 20  # of a prefix

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_1("per_device_train_batch_size", "tokens_per_batch")
        self._require(0 < self.num_train_epochs < math.inf, "num_train_epochs", "above 0")
        self._require(0 < self.layerwise_lr_decay <= 1, "layerwise_lr_decay", "above 0, and 1 at most")
        self._require(self.peft in ("", *PEFT), "peft", f"{', '.join(PEFT)}, or empty")
        self._require(self.class_weights in ("", "balanced"), "class_weights", "balanced, or empty")
        patience = self.early_stopping_patience
        self._require(patience is None or patience >= 1, "early_stopping_patience", "1 or more")
        parts = [FROZEN.fullmatch(part.strip()) for part in self.freeze.split(",")] if self.freeze else []
        self._require(None not in parts, "freeze", "embeddings, layers:0-3, or both, separated by a comma")


def load_model(
    task: Task, folder: str | Path, backend: str | Backend, dtype: str = "float32", seed: int = 0
) -> tuple[PreTrained, set[str]]:
    """The task's model with the weights in a folder, and the names of parameters that are new.

    A head in the folder is kept where its labels are the task's, by name and order; else a new one is drawn from
    `seed`. A warning names what else is missing, which is initialised too, and what is not used and is no part of
    pretraining. Raises UserError for a folder that does not fit.
    """
    if isinstance(task, Embed):
        return task.load(folder, backend, dtype, seed), set()
    config = read_config(folder)
    kind = task.model_class(config)
    known = architecture_of(config) == kind.__name__
    kept = known and (not task.names or label_names(config) == task.names)
    if not has_weights(folder):
        raise UserError(f"no weights in {folder}: expected a pretrained model, such as `minibert pretrain` writes")
    model, report = kind.load_folder(
        folder, backend, dtype, seed, ignore_mismatched_sizes=known and not kept, **task.labels()
    )
    head = f"{kind.head}."
    LoadReport(
        tuple(name for name in report.missing_keys if not name.startswith(head)),
        tuple(name for name in report.unexpected_keys if not LEFT_BEHIND.match(name)),
        tuple(wrong for wrong in report.mismatched_keys if not wrong[0].startswith(head)),
    ).tell(folder)
    new = set(report.missing_keys)
    if not kept:
        of_head = {name for name, _ in model.named_parameters() if name.startswith(head)}
        model.initialise(of_head)
        new |= of_head
    return model, new


def tuned(model: PreTrained, task: Task, new: set[str], config: FineTuningConfig, steps: int, base: str | None) -> Any:
    """The model as `config.peft` asks for; what is new in it is trained whole."""
    if not config.peft:
        return model
    without_pooler = any(".pooler." in name for name in new)
    if config.peft in ("houlsby", "pfeiffer"):
        if without_pooler:
            raise UserError(f"peft {config.peft}: the model has no pooler, and these files hold none: take lora, say")
        return get_peft_model(model, DoubleSeqBnConfig() if config.peft == "houlsby" else SeqBnConfig())
    common: dict[str, Any] = {
        "task_type": task.task_type, "modules_to_save": ["pooler"] if without_pooler else None,
        "base_model_name_or_path": base,
    }  # fmt: skip
    if config.peft == "prefix":
        return get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=config.num_virtual_tokens, **common))
    common |= {
        "target_modules": "all-linear" if config.target_modules == "all-linear" else config.target_modules.split(","),
        "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout,
    }  # fmt: skip
    if config.peft == "lora":
        return get_peft_model(model, LoraConfig(r=config.lora_r, **common))
    # As the authors do: half as much again at first, ranks that stay in the last fifth of the steps.
    common |= {"init_r": -(-3 * config.lora_r // 2), "target_r": config.lora_r, "total_step": steps}
    return get_peft_model(
        model, AdaLoraConfig(tinit=steps // 10, tfinal=steps // 5, deltaT=max(1, steps // 100), **common)
    )


class FineTuning(Loop):
    """A run of fine-tuning (see `Loop`). At the top of its folder is the best model so far, not the last.

    Raises UserError where model, examples and config do not fit.
    """

    config: FineTuningConfig

    def __init__(
        self, model: Any, task: Task, train: Prepared, validation: Prepared, tokenizer: Tokenizer,
        config: FineTuningConfig, output: str | Path, options: Mapping[str, Any] | None = None, *,
        new: set[str] | None = None, base: str | None = None,
    ) -> None:  # fmt: skip
        """`new` are parameters that the pretrained model, in the folder `base`, had not: what `load_model` gives."""
        check_vocabulary(tokenizer, model.config.vocab_size)
        task.check(config, train)
        self.task, self.train, self.validation, self.config = task, train, validation, config
        self.most_examples = config.per_device_train_batch_size  # of a pass
        self.batch_size = self.most_examples * config.gradient_accumulation_steps  # of one update
        self.planned: tuple[int, list[np.ndarray]] = (-1, [])  # an epoch, and its batches
        steps = [len(self.batches(epoch)) for epoch in range(math.ceil(config.num_train_epochs))]
        self.ends = np.cumsum(steps)  # the step with which each epoch ends
        wanted = np.interp(config.num_train_epochs, range(len(steps) + 1), [0, *self.ends])  # the last may be in part
        max_steps = max(1, math.ceil(wanted - 1e-9))
        self.base = base
        model = tuned(model, task, new or set(), config, max_steps, base)
        most, given = most_tokens(model), config.max_seq_length
        if given > most:
            raise UserError(f"expected max_seq_length of at most {most}, the model's positions, got {given}: lower it")
        freeze(model, config.freeze)
        groups = layerwise_groups(model, config.weight_decay, config.layerwise_lr_decay)
        super().__init__(model, tokenizer, config, max_steps, AdamW.of(config, groups), output, options)
        self.class_weights = balanced(task, train) if config.class_weights else None
        self.metric = f"eval_{(config.metric_for_best_model or task.main_metric(validation)).removeprefix('eval_')}"
        known = ["loss", *figure_names(task, validation)]
        if self.metric.removeprefix("eval_") not in known:
            raise UserError(
                f"metric_for_best_model: expected one of {', '.join(known)}, got {config.metric_for_best_model!r}"
            )
        self.progress |= {"best": None, "evaluations_since": 0}

    @property
    def epoch(self) -> float:
        """Passes over the examples so far."""
        return float(np.interp(self.step, [0, *self.ends], range(len(self.ends) + 1)))

    @property
    def fingerprint(self) -> int:
        found = 0
        for part in (self.train, self.validation):
            for array in (part.sequences.ids, part.sequences.offsets, np.asarray(part.targets)):
                found = zlib.crc32(np.ascontiguousarray(array).tobytes(), found)
        return found

    # ---------------------------------------------------------------------------------------------------------- steps

    def batches(self, epoch: int) -> list[np.ndarray]:
        """The numbers of each update's examples: in each epoch all of them once, in an order drawn by its number."""
        if self.planned[0] != epoch:
            order = shuffled(self.train.count, Stream(self.config.seed, SHUFFLE_STREAM, epoch))
            self.planned = epoch, self.task.batches(self.train, order, self.batch_size)
        return self.planned[1]

    def chosen(self, step: int) -> np.ndarray:
        """The numbers of an update's examples."""
        epoch = int(np.searchsorted(self.ends, step, side="right"))
        begin = self.ends[epoch - 1] if epoch else 0
        return self.batches(epoch)[step - begin]

    @np.errstate(all="ignore")  # the guard sees what NumPy would warn of, and says where it began
    def forward_backward(self) -> tuple[float, int]:
        """Gradients and loss of an update's examples, in passes of equal number, as if they were one batch.

        The loss of a pass is a mean, so it counts by what it is the mean of: examples, or words with a label.
        """
        self.model.train()
        self.optimizer.zero_grad()
        first = self.step * self.config.gradient_accumulation_steps
        passes = [
            (number, *part)
            for number in range(first, first + -(-len(self.chosen(self.step)) // self.most_examples))
            for part in in_parts(self.task, self.model, self.train, self.of_pass(number), self.progress[PARTS])
        ]
        weights = [self.weight(targets) for _, _, targets in passes]
        total, loss = sum(weights), 0.0
        for (number, packed, targets), weight in zip(passes, weights, strict=True):
            if not weight:
                continue
            self.model.step = self.number = number  # names the dropout masks
            _, mean = self.task.forward(self.model, packed, targets, self.class_weights)
            assert mean is not None
            mean.backward(np.asarray(weight / total))
            loss += mean.item() * weight / total
        return loss, sum(len(packed.input_ids) for _, packed, _ in passes)

    def of_pass(self, number: int) -> np.ndarray:
        """The numbers of the examples of one pass of the step."""
        start = self.most_examples * (number - self.step * self.config.gradient_accumulation_steps)
        return self.chosen(self.step)[start : start + self.most_examples]

    def most_parts(self) -> int:
        return 1 if self.task.in_batch else min(self.most_examples, len(self.chosen(self.step)))

    def failed_step(self) -> FailedStep | None:
        kind = task_of(self.model.config, type(self.model).__name__)
        if kind is None or isinstance(self.model, TunedModel) or self.class_weights is not None:
            return None
        chosen = self.of_pass(self.number)
        flat = packed_sequences(self.train.sequences, self.train.sequences_of(chosen))
        batch = {**vars(flat), "labels": targets_of(self.task, self.train, chosen)}
        arrays = {name: array for name, array in batch.items() if array is not None}
        name = "regress" if kind.problem_type == REGRESSION else type(kind).__name__.lower()
        return FailedStep(arrays, name, self.model.place.dtype, self.config.seed, self.number)

    def weight(self, targets: np.ndarray) -> float:
        """What the mean loss of a pass is the mean of; with class weights, their sum."""
        if self.class_weights is None:
            return self.task.counted(targets)
        return float(np.asarray(self.class_weights)[targets[targets >= 0]].sum())

    # ----------------------------------------------------------------------------------------------------- evaluation

    def eval_due(self) -> bool:
        return self.step in self.ends

    def evaluate(self) -> Record:
        """Loss and metrics on the validation examples."""
        tokens = max(1, self.config.tokens_per_batch // self.eval_parts)
        loss, scores, _ = evaluate(self.task, self.model, self.validation, tokens)
        return {"epoch": round(self.epoch, 4), "eval_loss": loss, **prefixed("eval", scores.figures)}

    def evaluate_and_log(self) -> Record:
        """As `Loop.evaluate_and_log`; whether it is the best so far is noted, and the run may end early.

        The untrained model, whose head may have guessed well, is kept until there is another.
        """
        record = super().evaluate_and_log()
        found = {name: record.get(name) for name in ("step", "eval_loss", self.metric)}
        best = self.progress["best"]
        if best is None or best["step"] == 0 or self.rank(found) > self.rank(best):
            self.progress |= {"best": found, "evaluations_since": 0}
        else:
            self.progress["evaluations_since"] += 1
        self.end_early()
        return record

    def rank(self, found: Mapping[str, Any]) -> tuple[float, float]:
        """Higher is better: by the metric; where it is the same, or not defined, by the loss."""

        def of(name: str) -> float:
            value = found[name]
            return -math.inf if value is None else -value if lower_is_better(name) else value

        return of(self.metric), of("eval_loss")

    @property
    def ended_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress["evaluations_since"] >= patience

    def end_early(self) -> None:
        if self.ended_early:
            self.max_steps = self.step

    def resume(self, state: State) -> None:
        """As `Loop.resume`; a run that ended early goes on only with more patience."""
        best, figures = state.progress.get("best"), ("step", "eval_loss", self.metric)
        if not isinstance(best, dict) or not best.keys() >= set(figures) or best["step"] is None:
            raise UserError(f"the state has no best model with {', '.join(figures)}: begin a new run")
        super().resume(state)
        self.end_early()

    def save_due(self) -> bool:
        """After each evaluation that found a better model: the next update changes it."""
        return self.best_is_now

    @property
    def best_is_now(self) -> bool:
        return self.progress["best"]["step"] == self.step

    def save_model(self, folder: Path) -> None:
        """The best model so far; it may be that of the checkpoint before, or of one that could not be written."""
        if self.best_is_now:
            self.save_best(folder)
            return
        saved = self.writer.saved
        assert saved is not None
        copies = {name: partial(copy, saved / name) for name in model_files(saved)}
        for name, write in (self.writer.unwritten or copies).items():
            write_atomically(folder / name, write)

    def save_best(self, folder: Path) -> None:
        """The model as it is, and its tokenizer; of a tuned one the adapter, and the config with its labels."""
        save_tokenizer(self.tokenizer, folder, self.model.config.max_position_embeddings)
        self.task.save(self.model, self.tokenizer, folder, self.config.max_seq_length)
        if isinstance(self.model, TunedModel):
            model = self.model.model
            beside = replace(model.config, others={**model.config.others, "_name_or_path": self.base})
            write_config(folder, beside, type(model).__name__, model.place.dtype)


def copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def lower_is_better(metric: str) -> bool:
    return metric.endswith(("_loss", "_error"))


def freeze(model: PreTrained, what: str) -> None:
    """Set apart what is not trained. Raises UserError for layers that the model lacks."""
    count = model.config.num_hidden_layers
    for part in filter(None, map(str.strip, what.split(","))):
        found = FROZEN.fullmatch(part)
        assert found is not None
        first = int(found[2] or 0)
        last = int(found[3] or first)
        if not found[1] and not first <= last < count:
            raise UserError(f"freeze: expected layers from 0 to {count - 1}, got {part}")
        for name, parameter in model.named_parameters():
            layer = LAYER.search(name)
            inside = layer is not None and first <= int(layer[1]) <= last
            if EMBEDDINGS.match(name) if found[1] else inside:
                parameter.requires_grad = False


def layerwise_groups(model: PreTrained, weight_decay: float, decay: float) -> list[dict[str, Any]]:
    """Groups of parameters whose learning rate falls by `decay` from the head down, layer by layer, to the embeddings.

    Howard, Ruder (2018), "Universal language model fine-tuning", section 3.2. Without decay as `parameter_groups`.
    """
    if decay == 1:
        return parameter_groups(model, weight_decay)
    top = model.config.num_hidden_layers + 1
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer = LAYER.search(name)
        depth = int(layer[1]) + 1 if layer else 0 if EMBEDDINGS.match(name) else top
        matrix = len(parameter.declared_shape) > 1
        group = {"params": [], "weight_decay": weight_decay * matrix, "lr_scale": decay ** (top - depth)}
        groups.setdefault((depth, matrix), group)["params"].append(parameter)
    return list(groups.values())


def balanced(task: Task, train: Prepared) -> list[float]:
    """(K,) the weight of each class by which all classes count the same: rows / (K rows of the class)."""
    targets = np.asarray(train.targets)
    if targets.dtype.kind != "i" or targets.ndim != 1:
        raise UserError("class_weights: expected one class for each example or word: others have no weights")
    counts = np.bincount(targets[targets >= 0], minlength=len(task.names))
    return [float(counts.sum() / (np.count_nonzero(counts) * count)) if count else 0.0 for count in counts]


def prefixed(prefix: str, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}


def split_examples(count: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of examples to train on and to hold out, drawn by `seed`; one at least in each."""
    if count < 2:
        raise UserError(f"expected two examples or more, to hold some out, got {count}: add some, or give --validation")
    order = shuffled(count, Stream(seed, SHUFFLE_STREAM, 0xFFFFFFFF))
    held_out = min(max(round(share * count), 1), count - 1)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def names_for(examples: Any, folder: str | Path, task: type[Task]) -> Sequence[str]:
    """The labels of the model in a folder, where it is of this task and has all that the examples have; else theirs."""
    config, own = read_config(folder), own_names(examples)
    if architecture_of(config) != task.model_class(config).__name__:
        return own
    names = label_names(config)
    if getattr(examples, "problem_type", None) == REGRESSION:
        return names if len(names) == 1 else own
    return names if set(own) <= LabelIds(names).ids.keys() else own


__all__ = [
    "Classify", "FineTuning", "FineTuningConfig", "evaluate", "load_model", "names_for", "predict", "split_examples",
]  # fmt: skip
