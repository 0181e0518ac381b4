"""The loop of every training run: updates, evaluation, a log, and a state from which a run goes on exactly.

What a step does is named by its number alone (batches, masks and dropout are drawn by Philox from seed and step), so a
run that was stopped goes on with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from minibert.data import save_tokenizer
from minibert.errors import Interrupted, UserError, WriteError
from minibert.kernels.op import holds_floats
from minibert.model.checkpoint import written_later
from minibert.train.checkpoint import (
    STATE,
    State,
    alone,
    checkpoints,
    publish,
    read_state,
    refuse_to_overwrite,
    remove,
    remove_partial,
    require_room,
    step_of,
)
from minibert.train.config import OptimizationConfig
from minibert.train.failed_step import FailedStep, command, write_failed_step
from minibert.train.guard import FirstNonFinite, NonFiniteError
from minibert.train.log import LOG, Record, add_line, forget_after
from minibert.train.optim import AdamW, linear_schedule
from minibert.train.parts import PARTS, evaluated, in_memory
from minibert.train.saving import CheckpointWriter, Copied
from minibert.train.tensorboard import PREFIX, EventFile
from minibert.train.weights_and_biases import wandb_library, write_offline_run
from minibert.tuning.tuned import TunedModel

FORMAT = 1  # of the state: states without one are older
UNEVALUATED = "unevaluated"  # in a run's progress
SINCE = ("steps", "loss", "tokens", "seconds")  # sums since the last line of the log

Kind = Literal["step", "log", "eval"]


def demand_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")


def shares(counts: Sequence[int]) -> list[float]:
    """Each count's share of their sum."""
    return [count / sum(counts) for count in counts]


class Loop:
    """One run, whose results are written into the folder `output` as it goes, checkpoints by another thread.

    There: the model, as `from_pretrained` reads it; its tokenizer; `training_log.jsonl`; and checkpoints.
    `options` is kept in the state for whoever resumes; the loop itself heeds "tensorboard": event files beside the log,
    and "wandb", a project's name: the log as an offline run of it, written at the end.
    A subclass says what a step computes (`forward_backward`), when and how the model is evaluated (`eval_due`,
    `evaluate`), and what the data are (`fingerprint`). Raises UserError from `run` where the folder is not empty and
    not resumed from.
    """

    eval_parts = 1  # that a batch of `evaluate` is computed in; 0: it cannot be cut

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
        self.writer = CheckpointWriter(self.output, lambda: sum(self.sizes()))
        self.resumed = False  # and has not gone on yet
        self.measured: dict[str, float] = {}  # what else the last step found, under its names in the log
        self.kernels: Sequence[str] = ()  # of one's own, as --kernel takes them: named where a step is to be seen again
        self.graphed: Any = None  # what replays steps as graphs, where a subclass does
        self.number = 0  # of the pass that is computed, or was last
        self.stop = False  # set it, from a signal handler say, and the run ends after the step
        self.compiled = False  # what a step needs: it was taken once
        self.may_be_left = False  # what is computed is no part of the state: a handler may raise Interrupted as well
        # How far the run came, and sums since the last line of the log: plain numbers, saved as they are.
        self.progress: dict[str, Any] = {
            "step": 0, "tokens": 0, "seconds": 0.0, "save_seconds": 0.0, "since": dict.fromkeys(SINCE, 0),
            PARTS: 1,
        }  # fmt: skip

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.progress["step"]

    def forward_backward(self) -> tuple[float, int]:
        """Gradients and loss of the step's batches as if they were one batch; and their tokens."""
        raise NotImplementedError

    def most_parts(self) -> int:
        """How many parts a pass of the step can be computed in (`train.parts`)."""
        raise NotImplementedError

    def evaluate(self) -> Record:
        """How good the model is now, in numbers that the log takes."""
        raise NotImplementedError

    def eval_due(self) -> bool:
        """Whether the model is evaluated after this step."""
        raise NotImplementedError

    def save_due(self) -> bool:
        """Whether there is a checkpoint after this step, beside those of each `save_steps`."""
        return False

    @property
    def fingerprint(self) -> int:
        """A checksum of the data: a run goes on with those it began with."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Iterator[tuple[Kind, Record]]:
        """Train to the end, or until `stop`; the state is saved first and last. Yields all that comes.

        Raises WriteError where the log, the first or the last checkpoint cannot be written: the one before is whole.
        Another one that cannot is a warning, unless `config.save_errors` is "fatal".
        """
        if self.writer.saved is None:
            refuse_to_overwrite(self.output)
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot write into {self.output}: {error}; choose another --output") from None
        with alone(self.output), ThreadPoolExecutor(1) as self.writer.pool:  # leaving, it waits for the write in flight
            yield from self.steps()
        if project := self.options.get("wandb"):
            write_offline_run(self.output, project, {**self.options, **asdict(self.config)})

    def steps(self) -> Iterator[tuple[Kind, Record]]:
        config = self.config
        if self.writer.saved is None or (self.predates_checkpoints and self.step == 0):  # which was saved unevaluated
            yield "eval", self.begin()
        else:
            self.go_on()
        if self.unevaluated and not self.stop:
            with suppress(Interrupted):
                yield "eval", self.evaluate_and_log()
                self.save_again()
        while self.step < self.max_steps and not self.stop:
            try:
                record = self.train_step()
            except Interrupted:
                break
            yield "step", record
            if self.step % config.logging_steps == 0 or self.step == self.max_steps:
                yield "log", self.log(self.summary(record))
            if self.eval_due() or self.step == self.max_steps:
                self.progress[UNEVALUATED] = True
            if self.unevaluated:
                try:
                    yield "eval", self.evaluate_and_log()
                except Interrupted:
                    break
            if self.step % config.save_steps == 0 or self.save_due():
                self.save()
            else:
                self.writer.settle_if_done(self.config.save_errors == "fatal")  # a failure is told at once
        if self.step != self.writer.step:
            self.save()
        self.settle(last=True)

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
        with nullcontext() if self.compiled else self.left_when_stopped():
            loss, tokens = in_memory(self)
        self.compiled = True
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
            f"step {self.step + 1}: {error}: {found}. Nothing was updated; begin a run with a lower learning rate than "
            f"{self.optimizer.lr:.3g}: resumed, this one comes to the same{self.seen_again()}"
        )

    def failed_step(self) -> FailedStep | None:
        """The pass that is computed, or was last, where `minibert diff` has models and tasks of its kind."""
        return None

    def seen_again(self) -> str:
        """Keep what it takes to see the step again next to the run: how, as the end of a message."""
        failed, folder = self.failed_step(), self.output / f"nonfinite-{self.step + 1}"
        if failed is None:
            return ""
        try:
            write_failed_step(folder, self.model, failed)
        except (OSError, UserError) as error:
            return f". The step could not be kept: {error}"
        return f". To see it again: {command(folder, self.model.backend, self.kernels)}"

    @property
    def unevaluated(self) -> bool:
        """Whether the run was stopped in the evaluation after its last step, which is made up for when it goes on."""
        return self.progress.get(UNEVALUATED, False)

    @contextmanager
    def left_when_stopped(self) -> Iterator[None]:
        """Within, the run need not come to an end: Interrupted may be raised by a signal handler."""
        self.may_be_left = True
        try:
            yield
        finally:
            self.may_be_left = False

    def evaluate_and_log(self) -> Record:
        with self.left_when_stopped():
            found = evaluated(self)
        self.progress.pop(UNEVALUATED, None)
        return self.log({"step": self.step, **found})

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
            "save_seconds": self.progress["save_seconds"],
        }

    def log(self, record: Record) -> Record:
        with self.writing():
            add_line(self.output, record)
            if self.events is not None:
                self.events.scalars(record["step"], record)
        return record

    def open_events(self, step: int) -> None:
        """Where the options ask for it, log for TensorBoard too, from `step` on."""
        self.events = EventFile(self.output, step) if self.options.get("tensorboard") else None

    def begin(self) -> Record:
        """Evaluate what is untrained, and save: what cannot be written shows now."""
        if self.writer.saved is None:
            refuse_to_overwrite(self.output)  # another run may have been faster
        with self.writing():
            remove_partial(self.output)
        self.require_room()
        with self.writing():
            for path in (self.output / LOG, *self.output.glob(f"{PREFIX}*")):
                path.unlink(missing_ok=True)
            self.open_events(0)
        record = self.evaluate_and_log()
        self.save()
        self.settle(last=True)
        self.resumed = False
        return record

    def go_on(self) -> None:
        """Make the folder what it was when the state that is resumed was saved."""
        for path in checkpoints(self.output):
            if step_of(path) > self.step and path.name not in self.writer.broken:
                raise UserError(f"{self.output}: another run has gone on to {path.name} meanwhile: resume that")
        if not self.resumed:
            return
        assert self.writer.saved is not None
        if self.predates_checkpoints:
            forget_after(self.output, self.step)
        with self.writing():
            remove_partial(self.output)
            if not self.predates_checkpoints:
                publish(self.writer.saved, self.output)
            self.open_events(self.step + 1)
        if self.step < self.max_steps:
            self.require_room()
        if self.predates_checkpoints:
            self.save()
            self.settle(last=True)
        self.resumed = False

    @property
    def predates_checkpoints(self) -> bool:
        """Whether the run was resumed from the one state that runs had at the top of their folder."""
        return self.writer.saved == self.output

    def require_room(self) -> None:
        """Raise WriteError where the checkpoints of the run will not find room."""
        missing = max(1, self.config.save_total_limit + 1 - len(checkpoints(self.output)))
        whole, model = self.sizes()
        require_room(self.output, missing * whole + 2 * model)

    def sizes(self) -> tuple[int, int]:
        """Bytes of a checkpoint, and of the model in it."""
        model = sum(array.nbytes for array in self.model.state_dict().values())
        return 2 * model + sum(array.nbytes for array in self.optimizer.state_dict().values()), model

    def writing(self) -> AbstractContextManager[None]:
        """What cannot be written within is told in one line."""
        return self.writer.telling(self.step)

    @contextmanager
    def lost_to_saving(self) -> Iterator[None]:
        """Count the time for which training stands still."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.progress["save_seconds"] += time.perf_counter() - began

    def save(self) -> None:
        """Copy what makes a checkpoint, and have it written while training goes on. The write before is waited for."""
        self.settle()
        with self.lost_to_saving():
            arrays = {f"model.{name}": array for name, array in self.model.state_dict().items()}
            arrays |= {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
            self.refuse_nonfinite(arrays)
            about = json.dumps({
                "format": FORMAT,
                "config": asdict(self.config),
                "options": self.options,
                "progress": {**self.progress, "fingerprint": self.fingerprint},
            })  # fmt: skip

            def copied() -> Copied:
                with written_later() as files:
                    self.save_model(self.output)
                named = {path.relative_to(self.output).as_posix(): write for path, write in files.items()}
                # One that lacks its evaluation will be written again: until then there is another.
                keep = self.config.save_total_limit + self.unevaluated
                return Copied(self.step, arrays, about, named, (self.output / LOG).stat().st_size, keep)

            self.writer.begin(copied, self.step)

    def settle(self, last: bool = False) -> None:
        """Wait for the checkpoint in flight. One that failed is a warning, or raises WriteError: the `last` always."""
        with self.lost_to_saving():
            self.writer.settle(last or self.config.save_errors == "fatal")

    def refuse_nonfinite(self, arrays: Mapping[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if holds_floats(array) and not np.isfinite(array).all():
                raise NonFiniteError(
                    f"step {self.step}: {name} is not finite after the update, and is not saved; begin a run with a "
                    f"lower learning rate than {self.optimizer.lr:.3g}: resumed, this one comes to the same"
                )

    def save_again(self) -> None:
        """Write the checkpoint anew that was written before its step was evaluated."""
        before = [path for path in checkpoints(self.output) if step_of(path) < self.step]
        if before and self.writer.saved is not None:
            with self.writing():
                remove(self.writer.saved)
            self.writer.saved = before[0]  # of the same best model, where it is that which is saved
            self.save()

    def save_model(self, folder: Path) -> None:
        """Write the files for the top of the output, as they are after this step: the model and its tokenizer.

        It runs within `written_later`: what is written is collected, and must be copies of what the next step changes.
        """
        save_tokenizer(self.tokenizer, folder, self.model.config.max_position_embeddings)
        self.model.save_pretrained(folder)

    def resume(self, state: State) -> None:
        """Go on from a state. Raises UserError where it belongs to another model or text."""
        progress = dict(state.progress)
        if progress.pop("fingerprint") != self.fingerprint:
            raise UserError("the text, its tokens or its split are not those this run began with: give the same text")
        self.model.load_state_dict(
            {name.removeprefix("model."): array for name, array in state.arrays.items() if name.startswith("model.")}
        )
        self.optimizer.load_state_dict(
            {name.removeprefix("optimizer."): a for name, a in state.arrays.items() if name.startswith("optimizer.")}
        )
        self.progress = {**self.progress, **progress, "since": dict(progress["since"])}
        self.writer.saved, self.writer.broken, self.resumed = state.folder, state.broken, True


__all__ = ["LOG", "STATE", "Kind", "Loop", "Record", "State", "read_state", "refuse_to_overwrite"]
