"""The loop of every training run: updates, evaluation, a log, and a state from which a run goes on exactly.

What a step does is named by its number alone (batches, masks and dropout are drawn by Philox from seed and step), so a
run that was stopped goes on with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minibert.data import save_tokenizer
from minibert.errors import UserError
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.train.config import OptimizationConfig, TrainingConfig
from minibert.train.guard import FirstNonFinite, NonFiniteError
from minibert.train.log import LOG, Record, add_line, forget_after
from minibert.train.optim import AdamW, linear_schedule
from minibert.train.tensorboard import EventFile
from minibert.train.weights_and_biases import wandb_library, write_offline_run
from minibert.tuning.tuned import TunedModel

STATE = "trainer_state.safetensors"
FORMAT = 1  # of the state: states without one are older
SINCE = ("steps", "loss", "tokens", "seconds")  # sums since the last line of the log

Kind = Literal["step", "log", "eval"]


def demand_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")


def shares(counts: Sequence[int]) -> list[float]:
    """Each count's share of their sum."""
    return [count / sum(counts) for count in counts]


class State(NamedTuple):
    """A run as it was saved: its config, what else was asked for (`options`), how far it came, weights and moments."""

    config: Any  # of the kind that was asked for
    options: dict[str, Any]
    progress: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_state(folder: str | Path, kind: type[OptimizationConfig] = TrainingConfig) -> State:
    """The state in `folder`, of a run with such a config. Raises UserError where there is none that can be read."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise UserError(f"nothing to resume in {folder}: expected {STATE} there, as a run writes it into its --output")
    arrays, metadata = read_arrays(path)
    try:
        about = json.loads(metadata["trainer_state"])
        config = about["config"]
        strange = config.keys() - {field.name for field in fields(kind)}
        if strange:
            raise TypeError(f"its setting {min(strange)} is another command's or another version's")
        if "format" not in about and config["warmup_steps"] == 0:
            config["warmup_steps"] = None  # before there was a format, 0 said "not given"
        return State(kind(**config), about["options"], about["progress"], arrays)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no state of such a run ({error}): begin a new run") from None


def refuse_to_overwrite(output: Path) -> None:
    """Raise UserError for a folder that holds something already: a run begins in one of its own."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder for the output")
    if output.is_dir() and any(output.iterdir()):
        resumable = (output / STATE).exists()
        mend = "go on with the run in it by --resume (Trainer.resume), or name another" if resumable else "name another"
        raise UserError(f"the output folder {output} is not empty: {mend}")


class Loop:
    """One run, whose results are written into the folder `output` as it goes.

    There: the model, as `from_pretrained` reads it; its tokenizer; `training_log.jsonl`; and the state to resume from.
    `options` is kept in the state for whoever resumes; the loop itself heeds "tensorboard": event files beside the log,
    and "wandb", a project's name: the log as an offline run of it, written at the end.
    A subclass says what a step computes (`forward_backward`), when and how the model is evaluated (`eval_due`,
    `evaluate`), and what the data are (`fingerprint`). Raises UserError from `run` where the folder is not empty and
    not resumed from.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, config: OptimizationConfig, max_steps: int, optimizer: AdamW,
        output: str | Path, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.tokenizer, self.config, self.max_steps, self.optimizer = tokenizer, config, max_steps, optimizer
        self.output, self.options = Path(output), dict(options or {})
        if config.checkpoint_activations:
            model.gradient_checkpointing_enable()
        if self.options.get("wandb"):
            wandb_library()  # told now, not at the end
        self.events: EventFile | None = None
        self.owns_output = False  # what is in the folder was written, or resumed from, by this trainer
        self.measured: dict[str, float] = {}  # what else the last step found, under its names in the log
        self.stop = False  # set it, from a signal handler say, and the run ends after the step
        # How far the run came, and sums since the last line of the log: plain numbers, saved as they are.
        self.progress: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "since": dict.fromkeys(SINCE, 0)}

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.progress["step"]

    def forward_backward(self) -> tuple[float, int]:
        """Gradients and loss of the step's batches as if they were one batch; and their tokens."""
        raise NotImplementedError

    def evaluate(self) -> Record:
        """How good the model is now, in numbers that the log takes."""
        raise NotImplementedError

    def eval_due(self) -> bool:
        """Whether the model is evaluated after this step."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> int:
        """A checksum of the data: a run goes on with those it began with."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Iterator[tuple[Kind, Record]]:
        """Train to the end, or until `stop`; the state is saved first and last. Yields all that comes."""
        config = self.config
        if self.step == 0:
            self.begin()
            yield "eval", self.evaluate_and_log()
        saved = self.step
        while self.step < self.max_steps and not self.stop:
            record = self.train_step()
            yield "step", record
            if self.step % config.logging_steps == 0 or self.step == self.max_steps:
                yield "log", self.log(self.summary(record))
            if self.eval_due() or self.step == self.max_steps:
                yield "eval", self.evaluate_and_log()
            if self.step % config.save_steps == 0:
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()
        if project := self.options.get("wandb"):
            write_offline_run(self.output, project, {**self.options, **asdict(self.config)})

    def train_step(self) -> Record:
        """One update. Raises NonFiniteError, with nothing updated, where loss or gradients are not finite."""
        began = time.perf_counter()
        config = self.config
        learning_rate = config.learning_rate * linear_schedule(
            self.step, config.warmup_of(self.max_steps), self.max_steps
        )
        self.optimizer.lr = learning_rate
        try:
            loss, tokens = self.update()
        except FloatingPointError as error:
            raise NonFiniteError(self.explain(error)) from None
        seconds = time.perf_counter() - began
        self.progress["step"] += 1
        self.progress["tokens"] += tokens
        self.progress["seconds"] += seconds
        since = self.progress["since"]
        for name, value in (*zip(SINCE, (1, loss, tokens, seconds), strict=True), *self.measured.items()):
            since[name] = since.get(name, 0) + value
        return {
            "step": self.step,
            "loss": loss,
            **self.measured,
            "learning_rate": learning_rate,
            "grad_norm": self.optimizer.grad_norm,
            "tokens": tokens,
            "seconds": seconds,
        }

    def update(self) -> tuple[float, int]:
        """Gives the loss, and how many tokens it is of; raises FloatingPointError, nothing updated."""
        loss, tokens = self.forward_backward()
        demand_finite(loss)
        tuned = self.model if isinstance(self.model, TunedModel) else None
        if tuned is not None:
            demand_finite(tuned.before_update())
        self.optimizer.step()
        if tuned is not None:
            tuned.update_and_allocate(self.step + 1, self.optimizer.clip_factor)
        return loss, tokens

    def explain(self, error: FloatingPointError) -> str:
        """Run the step again, with an eye on every op, to find where it went wrong."""
        backend = self.model.backend
        found = "not seen again when the step was repeated: a kernel gives other results each time"
        try:
            with backend.watched_by(FirstNonFinite(backend.numpy)):
                self.forward_backward()
                self.optimizer.square_norm()
        except NonFiniteError as first:
            found = str(first)
        return (
            f"step {self.step + 1}: {error}: {found}. Nothing was updated; try a lower learning rate than "
            f"{self.optimizer.lr:.3g}, or --resume from the last checkpoint"
        )

    def evaluate_and_log(self) -> Record:
        return self.log({"step": self.step, **self.evaluate()})

    # ---------------------------------------------------------------------------------------------- log and checkpoints

    def summary(self, record: Record) -> Record:
        """A line of the log: means since the last one, totals since the start."""
        since = self.progress["since"]
        steps, loss, tokens, seconds = (since[name] for name in SINCE)
        self.progress["since"] = dict.fromkeys(SINCE, 0)
        return {
            **record,
            "loss": loss / steps,
            **{name: since[name] / steps for name in self.measured},
            "tokens": self.progress["tokens"],
            "tokens_per_second": tokens / seconds,
            "seconds": self.progress["seconds"],
        }

    def log(self, record: Record) -> Record:
        add_line(self.output, record)
        if self.events is not None:
            self.events.scalars(record["step"], record)
        return record

    def open_events(self, step: int) -> None:
        """Where the options ask for it, log for TensorBoard too, from `step` on."""
        self.events = EventFile(self.output, step) if self.options.get("tensorboard") else None

    def begin(self) -> None:
        """Write all there is before the first step: what cannot be written shows now, and there is a state."""
        self.claim_output()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            save_tokenizer(self.tokenizer, self.output, self.model.config.max_position_embeddings)
            (self.output / LOG).write_text("", encoding="utf-8")
            self.open_events(0)
        except (OSError, UserError) as error:
            raise UserError(f"cannot write into {self.output}: {error}; choose another --output") from None
        self.save()

    def claim_output(self) -> None:
        """Raise UserError where a write would replace what is not of this run."""
        if not self.owns_output:
            refuse_to_overwrite(self.output)
        self.owns_output = True

    def save(self) -> None:
        """Write the model and, in one file that replaces the last one whole, all that resuming needs."""
        self.claim_output()
        about = {
            "format": FORMAT,
            "config": asdict(self.config),
            "options": self.options,
            "progress": {**self.progress, "fingerprint": self.fingerprint},
        }
        weights = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        moments = {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        write_arrays(self.output / STATE, {**weights, **moments}, {"trainer_state": json.dumps(about)})
        self.save_model()

    def save_model(self) -> None:
        """The model as it is now, at the top of the folder."""
        self.model.save_pretrained(self.output)

    def resume(self, state: State) -> None:
        """Go on from a state. Raises UserError where it belongs to another model or text, or the log is damaged."""
        progress = dict(state.progress)
        if progress.pop("fingerprint") != self.fingerprint:
            raise UserError("the text, its tokens or its split are not those this run began with: give the same text")
        self.model.load_state_dict(
            {name.removeprefix("model."): array for name, array in state.arrays.items() if name.startswith("model.")}
        )
        self.optimizer.load_state_dict(
            {name.removeprefix("optimizer."): a for name, a in state.arrays.items() if name.startswith("optimizer.")}
        )
        self.progress = {**progress, "since": dict(progress["since"])}
        forget_after(self.output, self.step)
        self.owns_output = True
        self.open_events(self.step + 1)
