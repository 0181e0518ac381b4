"""Pretraining: steps over packed batches, held-out evaluation, a log, and a state from which a run goes on exactly.

    data = prepare(read_documents(["speeches.txt"]), tokenizer, config)
    trainer = Trainer(BertForMaskedLM(bert_config, backend="numba", seed=config.seed), data, config, "folder")
    for kind, record in trainer.run():
        print(kind, record)

What a step does is named by its number alone (its batch, masks and dropout are drawn by Philox from seed and step), so
a run that was stopped goes on with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minibert.data import (
    Batches,
    Document,
    PackedBatch,
    Sequences,
    check_vocabulary,
    encode,
    make_sequences,
    masking_rule,
    save_tokenizer,
    special_ids,
    split,
    vocabulary_size,
)
from minibert.errors import UserError
from minibert.kernels.cross_entropy import cross_entropy
from minibert.kernels.op import Array
from minibert.model.bert import BertForMaskedLM
from minibert.model.checkpoint import read_arrays, write_arrays
from minibert.model.packing import IGNORE, Packed, pack
from minibert.model.tensor import no_grad
from minibert.train.config import TrainingConfig
from minibert.train.graphed import GraphedSteps
from minibert.train.guard import FirstNonFinite, NonFiniteError
from minibert.train.optim import AdamW, linear_schedule, parameter_groups

LOG = "training_log.jsonl"
STATE = "trainer_state.safetensors"
FORMAT = 1  # of the state: states without one are older
SINCE = ("steps", "loss", "tokens", "seconds")  # sums since the last line of the log

Record = dict[str, Any]
Kind = Literal["step", "log", "eval"]


def demand_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")


def shares(counts: Sequence[int]) -> list[float]:
    """Each count's share of their sum."""
    return [count / sum(counts) for count in counts]


class Data(NamedTuple):
    """Text made ready: sequences to train on, those held out, how many tokens were read and how frequent each is."""

    tokenizer: Tokenizer
    train: Sequences
    held_out: Sequences
    tokens: int  # of the whole text, [CLS] and [SEP] not among them
    unigram: np.ndarray  # (V,) float64: log of each token's share of the training text, one added to each count

    @property
    def fingerprint(self) -> int:
        """A checksum: a run goes on with the text it began with."""
        return zlib.crc32(self.held_out.ids.tobytes(), zlib.crc32(self.train.ids.tobytes()))


def prepare(documents: Sequence[Document], tokenizer: Tokenizer, config: TrainingConfig) -> Data:
    """Encode, hold documents out, cut into sequences. Raises UserError where the text is too short."""
    special, encoded = special_ids(tokenizer), encode(documents, tokenizer)
    if config.next_sentence and encoded and all(len(document) == 1 for document in encoded):
        raise UserError(
            f"next_sentence: each of {len(encoded)} documents has a single sentence, so that none follows another: "
            "name another document separator, or leave it out"
        )
    train, held_out = (
        make_sequences(part, special, config.max_seq_length, config.next_sentence, config.seed)
        for part in split(encoded, config.held_out, config.seed)
    )
    tokens = sum(len(sentence) for document in encoded for sentence in document)
    counts = np.bincount(train.ids, minlength=vocabulary_size(tokenizer)) + 1.0
    counts[list(special)] = 1.0
    return Data(tokenizer, train, held_out, tokens, np.log(counts / counts.sum()))


class State(NamedTuple):
    """A run as it was saved: its config, what else was asked for (`options`), how far it came, weights and moments."""

    config: TrainingConfig
    options: dict[str, Any]
    progress: dict[str, Any]
    arrays: dict[str, np.ndarray]


def read_state(folder: str | Path) -> State:
    """The state in `folder`. Raises UserError where there is none, or none that can be read."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise UserError(
            f"nothing to resume in {folder}: expected {STATE} there, as `minibert pretrain --output` writes it"
        )
    arrays, metadata = read_arrays(path)
    try:
        about = json.loads(metadata["trainer_state"])
        config = about["config"]
        if "format" not in about and config["warmup_steps"] == 0:
            config["warmup_steps"] = None  # before there was a format, 0 said "not given"
        return State(TrainingConfig(**config), about["options"], about["progress"], arrays)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is no state of a run of this version ({error}): begin a new run") from None


def refuse_to_overwrite(output: Path) -> None:
    """Raise UserError for a folder that holds something already: a run begins in one of its own."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file: name a folder for the output")
    if output.is_dir() and any(output.iterdir()):
        resumable = (output / STATE).exists()
        mend = "go on with the run in it by --resume (Trainer.resume), or name another" if resumable else "name another"
        raise UserError(f"the output folder {output} is not empty: {mend}")


class Trainer:
    """One run, whose results are written into the folder `output` as it goes.

    There: the model, as `from_pretrained` reads it; its tokenizer; `training_log.jsonl`; and the state to resume from.
    `options` is kept in the state for whoever resumes. Raises UserError where model, text and config do not fit; and
    `run`, where the folder is not empty and not resumed from.
    """

    def __init__(
        self, model: BertForMaskedLM, data: Data, config: TrainingConfig, output: str | Path,
        options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        check_vocabulary(data.tokenizer, model.config.vocab_size)
        if config.max_seq_length > model.config.max_position_embeddings:
            raise UserError(
                f"expected max_seq_length of at most {model.config.max_position_embeddings}, the model's positions, "
                f"got {config.max_seq_length}: lower it"
            )
        self.model, self.data, self.config, self.output = model, data, config, Path(output)
        if config.checkpoint_activations:
            model.gradient_checkpointing_enable()
        self.options = dict(options or {})
        self.optimizer = AdamW(
            parameter_groups(model, config.weight_decay), config.learning_rate, (config.adam_beta1, config.adam_beta2),
            config.adam_epsilon, max_grad_norm=config.max_grad_norm,
        )  # fmt: skip
        rule = masking_rule(special_ids(data.tokenizer), vocabulary_size(data.tokenizer), config.mlm_probability)
        self.batches = Batches(data.train, config.tokens_per_batch, config.seed, rule)
        # With another seed, so that the masks have nothing to do with those of training.
        held_out = Batches(data.held_out, config.tokens_per_batch, config.seed ^ 0x5EED, rule)
        count = min(held_out.steps_in_epoch(0), -(-config.eval_tokens // config.tokens_per_batch))
        self.held_out = [held_out.batch(i) for i in range(count)]
        self.graphed = GraphedSteps(model, self.optimizer, config.tokens_per_batch) if config.graph else None
        self.made: dict[int, tuple[PackedBatch, Packed]] = {}  # batches of this step and, early, of the next, by pass
        self.owns_output = False  # what is in the folder was written, or resumed from, by this trainer
        self.stop = False  # set it, from a signal handler say, and the run ends after the step
        # How far the run came, and sums since the last line of the log: plain numbers, saved as they are.
        self.progress: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "since": dict.fromkeys(SINCE, 0)}

    @property
    def step(self) -> int:
        """Updates done so far."""
        return self.progress["step"]

    @property
    def unigram_loss(self) -> float:
        """Cross entropy of guessing held-out masked tokens by their frequency in the training text: to be beaten."""
        labels = np.concatenate([batch.labels[batch.labels != IGNORE] for batch in self.held_out])
        return float(-self.data.unigram[labels].mean())

    # ------------------------------------------------------------------------------------------------------- the loop

    def run(self) -> Iterator[tuple[Kind, Record]]:
        """Train to the end, or until `stop`; the state is saved first and last. Yields all that comes."""
        config = self.config
        if self.step == 0:
            self.begin()
            yield "eval", self.evaluate_and_log()
        saved = self.step
        while self.step < config.max_steps and not self.stop:
            record = self.train_step()
            yield "step", record
            if self.step % config.logging_steps == 0 or self.step == config.max_steps:
                yield "log", self.log(self.summary(record))
            if self.step % config.eval_steps == 0 or self.step == config.max_steps:
                yield "eval", self.evaluate_and_log()
            if self.step % config.save_steps == 0:
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()

    def train_step(self) -> Record:
        """One update. Raises NonFiniteError, with nothing updated, where loss or gradients are not finite."""
        began = time.perf_counter()
        config = self.config
        learning_rate = config.learning_rate * linear_schedule(self.step, config.warmup, config.max_steps)
        self.optimizer.lr = learning_rate
        try:
            loss, tokens = self.update_by_graph() if self.graphed is not None else self.update()
        except FloatingPointError as error:
            raise NonFiniteError(self.explain(error)) from None
        seconds = time.perf_counter() - began
        self.progress["step"] += 1
        self.made = {n: batch for n, batch in self.made.items() if n >= self.step * config.gradient_accumulation_steps}
        self.progress["tokens"] += tokens
        self.progress["seconds"] += seconds
        for name, value in zip(SINCE, (1, loss, tokens, seconds), strict=True):
            self.progress["since"][name] += value
        return {
            "step": self.step,
            "loss": loss,
            "learning_rate": learning_rate,
            "grad_norm": self.optimizer.grad_norm,
            "tokens": tokens,
            "seconds": seconds,
        }

    def update(self) -> tuple[float, int]:
        """Op by op. Gives the loss, and how many tokens it is of; raises FloatingPointError, nothing updated."""
        loss, tokens = self.forward_backward()
        demand_finite(loss)
        self.optimizer.step()
        return loss, tokens

    def update_by_graph(self) -> tuple[float, int]:
        """The same, where the step's shape has come before, in two calls of the device."""
        assert self.graphed is not None
        self.model.train()
        batch, packed = self.packed(self.step)
        loss, square_norm, recorded = self.graphed.gradients(packed, self.step)
        self.graphed.prepare(self.packed(self.step + 1)[1])  # uploaded by the graph itself
        value = float(self.model.backend.numpy(loss))
        demand_finite(value)
        self.optimizer.check_norm(square_norm)
        self.graphed.update(recorded, square_norm)
        return value, len(batch.input_ids)

    @np.errstate(all="ignore")  # the guard sees what NumPy would warn of, and says where it began
    def forward_backward(self) -> tuple[float, int]:
        """Gradients and loss of the step's batches as if they were one batch; and their tokens.

        The loss of a head is a mean, so a pass counts by what it is the mean of: predicted tokens, or sentence pairs.
        """
        passes = self.config.gradient_accumulation_steps
        self.model.train()
        self.optimizer.zero_grad()
        numbers = range(self.step * passes, (self.step + 1) * passes)
        batches = [self.packed(number)[0] for number in numbers]
        predicted = shares([int((batch.labels != IGNORE).sum()) for batch in batches])
        pairs = shares([len(batch.cu_seqlens) - 1 for batch in batches])
        loss = 0.0
        for number, share, share_of_pairs in zip(numbers, predicted, pairs, strict=True):
            batch, packed = self.packed(number)
            self.model.step = number  # names the dropout masks
            out = self.model(packed, return_dict=True)
            mean = out.loss
            if batch.next_sentence_label is not None:
                mean = mean + out.next_sentence_loss(batch.next_sentence_label) * (share_of_pairs / share)
            mean.backward(np.asarray(share))
            self.prepare(number + 1)
            loss += mean.item() * share
        return loss, sum(len(batch.input_ids) for batch in batches)

    def packed(self, number: int) -> tuple[PackedBatch, Packed]:
        """The batch of a pass as the model takes it, kept until its step is done."""
        if number not in self.made:
            batch = self.batches.batch(number)
            self.made[number] = batch, self.pack(batch, batch.labels)
        return self.made[number]

    def pack(self, batch: PackedBatch, labels: np.ndarray | None) -> Packed:
        return pack(
            self.model.config, batch.input_ids, token_type_ids=batch.token_type_ids, position_ids=batch.position_ids,
            labels=labels, cu_seqlens=batch.cu_seqlens,
        )  # fmt: skip

    def prepare(self, number: int) -> None:
        """While the device is still at work, make a batch of the next step, and begin to upload that of pass `number`.

        A step's batches are made before its first pass, which must know how many tokens all of them predict.
        """
        passes = self.config.gradient_accumulation_steps
        for each in (number + passes - 1, number):
            if each < self.config.max_steps * passes:
                self.packed(each)
        if number in self.made:
            self.model.backend.upload_ahead([a for a in self.made[number][1] if isinstance(a, np.ndarray)])

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

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluate(self) -> Record:
        """Loss and accuracy on the held-out masked tokens: always the same ones, dropout off."""
        self.model.eval()
        loss = hits = count = 0.0
        follows: list[np.ndarray] = []
        with no_grad():
            for batch in self.held_out:
                out = self.model(self.pack(batch, None), return_dict=True)
                index = np.flatnonzero(batch.labels != IGNORE)
                labels = batch.labels[index]
                logits = out.logits_at(index)
                hits += np.count_nonzero(logits.numpy().argmax(axis=-1) == labels)
                loss += self.mean_loss(logits.data, labels) * len(labels)
                count += len(labels)
                if batch.next_sentence_label is not None:
                    follows.append(out.seq_relationship_logits.numpy().argmax(axis=-1) == batch.next_sentence_label)
        record = {"eval_loss": loss / count, "eval_accuracy": float(hits / count)}
        if follows:
            record["eval_next_sentence_accuracy"] = float(np.concatenate(follows).mean())
        return record

    def mean_loss(self, logits: Array, labels: np.ndarray) -> float:
        backend = self.model.backend
        return float(backend.numpy(backend.run(cross_entropy, logits, backend.asarray(labels))[0]))

    def evaluate_and_log(self) -> Record:
        return self.log({"step": self.step, **self.evaluate(), "unigram_loss": self.unigram_loss})

    # ---------------------------------------------------------------------------------------------- log and checkpoints

    def summary(self, record: Record) -> Record:
        """A line of the log: means since the last one, totals since the start."""
        steps, loss, tokens, seconds = (self.progress["since"][name] for name in SINCE)
        self.progress["since"] = dict.fromkeys(SINCE, 0)
        return {
            **record,
            "loss": loss / steps,
            "tokens": self.progress["tokens"],
            "tokens_per_second": tokens / seconds,
            "seconds": self.progress["seconds"],
        }

    def log(self, record: Record) -> Record:
        with open(self.output / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        return record

    def begin(self) -> None:
        """Write all there is before the first step: what cannot be written shows now, and there is a state."""
        self.claim_output()
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            save_tokenizer(self.data.tokenizer, self.output, self.model.config.max_position_embeddings)
            (self.output / LOG).write_text("", encoding="utf-8")
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
            "progress": {**self.progress, "fingerprint": self.data.fingerprint},
        }
        weights = {f"model.{name}": array for name, array in self.model.state_dict().items()}
        moments = {f"optimizer.{name}": array for name, array in self.optimizer.state_dict().items()}
        write_arrays(self.output / STATE, {**weights, **moments}, {"trainer_state": json.dumps(about)})
        self.model.save_pretrained(self.output)

    def resume(self, state: State) -> None:
        """Go on from a state. Raises UserError where it belongs to another model or text, or the log is damaged."""
        progress = dict(state.progress)
        if progress.pop("fingerprint") != self.data.fingerprint:
            raise UserError("the text, its tokens or its split are not those this run began with: give the same text")
        self.model.load_state_dict(
            {name.removeprefix("model."): array for name, array in state.arrays.items() if name.startswith("model.")}
        )
        self.optimizer.load_state_dict(
            {name.removeprefix("optimizer."): a for name, a in state.arrays.items() if name.startswith("optimizer.")}
        )
        self.progress = {**progress, "since": dict(progress["since"])}
        self.forget_log_after(self.step)
        self.owns_output = True

    def forget_log_after(self, step: int) -> None:
        """Drop lines of steps that will be done again, and one that was cut short."""
        path = self.output / LOG
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        kept = []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n") and number == len(lines):
                continue
            try:
                of_step = int(json.loads(line.decode("utf-8"))["step"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise UserError(
                    f"{path}, line {number} is no record of a step: mend or remove it, or move the file away"
                ) from None
            if of_step <= step:
                kept.append(line)
        if kept != lines:
            path.write_bytes(b"".join(kept))
