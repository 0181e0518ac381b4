"""The model and the batches that commands take a training step of: a named size or a checkpoint, a task, real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from minibert.backends import Backend
from minibert.cli.labelled import EMBED, MLM, RTD, UNLABELLED, Labelled, note_of, read_examples, task_for
from minibert.cli.options import console
from minibert.data import (
    SHIPPED_TEXT,
    SHIPPED_VOCABULARY,
    Batches,
    Document,
    PackedBatch,
    check_vocabulary,
    encode,
    load_tokenizer,
    make_sequences,
    masking_rule,
    read_documents,
    special_ids,
    tokenizer_files,
    vocabulary_size,
)
from minibert.data.text import BLANK_LINE, TWO_BLANK_LINES
from minibert.errors import UserError
from minibert.model import checkpoint
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import NAMED, BertConfig, ElectraConfig
from minibert.model.electra_pair import ElectraPair, generator_of
from minibert.model.sentence_config import encoder_folder
from minibert.tasks.batches import TaskBatch, TaskBatches
from minibert.tasks.finetune import load_model
from minibert.tasks.from_text import examples_of_text
from minibert.tasks.task import architecture_of, task_of
from minibert.train.config import TrainingConfig
from minibert.train.failed_step import FailedStep, read_failed_step

SEPARATOR_HELP = (
    f"What separates the documents of a file: {TWO_BLANK_LINES}; {BLANK_LINE}, with a sentence a line, as Google's "
    "BERT takes text; line, where each is a document; file, where nothing does; or what a line reads, as <|endoftext|>."
)


GENERATOR_SIZE = TrainingConfig().generator_size
CHARACTERS = 12  # that are read for a token of a batch, which is 4 to 5 characters of English


class One(NamedTuple):
    """Batches of which there is one."""

    first: PackedBatch

    def batch(self, step: int) -> PackedBatch:
        """The same at each step."""
        return self.first


class Inputs(NamedTuple):
    """How the model and the batch of a step are made."""

    config: BertConfig
    make_model: Callable[[Backend, str], Any]  # on a backend, in a dtype
    make_batches: Callable[[], Batches | One]
    task: str = MLM
    how: str = ""  # where the examples of another task come from, and their labels

    def make_batch(self) -> PackedBatch:
        """The first, from text: what `preprocess` times."""
        return self.make_batches().batch(0)

    def say_how(self) -> None:
        """Print where the examples come from, if there is something to be said of it."""
        if self.how:
            console.print(f"{self.task}: {self.how}", markup=False, highlight=False, soft_wrap=True)


def step_inputs(
    config: str, text: list[Path] | None, tokens: int, max_seq_length: int, seed: int, steps: int = 1,
    labelled: Labelled = Labelled(),  # noqa: B008  it cannot be changed
) -> Inputs:  # fmt: skip
    """Read what `--config`, `--text` and `--train` name, examples for so many steps.

    Raises UserError for settings that do not fit.
    """
    labelled.refuse_unfit(text)
    folder = None if config in NAMED else Path(config)
    encoder = None if folder is None else encoder_folder(folder)  # a folder within it, in old ones of sentences
    tokenizer = load_tokenizer(encoder if encoder and tokenizer_files(encoder) else SHIPPED_VOCABULARY)
    model_config = named_config(config, vocabulary_size(tokenizer))
    folder = folder if labelled.task == EMBED else encoder
    if labelled.task == RTD and folder is None:
        model_config = ElectraConfig.like(model_config)
    check_vocabulary(tokenizer, model_config.vocab_size)
    if max_seq_length > model_config.max_position_embeddings:
        raise UserError(
            f"--max-seq-length {max_seq_length}: the model has {model_config.max_position_embeddings} positions; "
            "give that many or fewer"
        )
    if labelled.task not in UNLABELLED:
        return task_inputs(labelled, folder, model_config, tokenizer, text, tokens, max_seq_length, seed, steps)
    documents = enough(read_documents(text or [SHIPPED_TEXT]), tokens * steps)
    rule = masking_rule(special_ids(tokenizer), model_config.vocab_size)

    def make_batches() -> Batches:
        sequences = make_sequences(encode(documents, tokenizer), special_ids(tokenizer), max_seq_length)
        return Batches(sequences, max(tokens, int(sequences.lengths.max())), seed, rule)

    def make_model(backend: Backend, dtype: str) -> Any:
        if folder is not None:
            return (ElectraPair if labelled.task == RTD else BertForMaskedLM).from_pretrained(
                folder, backend, dtype, seed
            )
        if isinstance(model_config, ElectraConfig):
            return ElectraPair(model_config, generator_of(model_config, GENERATOR_SIZE), backend, dtype, seed)
        return BertForMaskedLM(model_config, backend, dtype, seed)

    return Inputs(model_config, make_model, make_batches, labelled.task)


def failed_inputs(folder: Path) -> tuple[Inputs, FailedStep]:
    """Those of a step that a run kept as it stopped at NaN. Raises UserError where the folder holds none."""
    step = read_failed_step(folder)
    config = checkpoint.read_config(folder)
    task = None if step.task in UNLABELLED else task_of(config, architecture_of(config))
    if task is None and step.task not in UNLABELLED:
        raise UserError(f"{folder} holds a step of the task {step.task!r}, and no model of it: get the folder anew")
    try:
        batch = PackedBatch(**step.batch) if task is None else TaskBatch(**step.batch, task=task)
    except TypeError:
        raise UserError(f"{folder}: its batch is another version's: run the training again with this one") from None

    def make_model(backend: Backend, dtype: str) -> Any:
        if task is not None:
            model = load_model(task, folder, backend, dtype, step.seed)[0]
        else:
            kind = ElectraPair if step.task == RTD else BertForMaskedLM
            model = kind.from_pretrained(folder, backend, dtype, step.seed)
        model.step = step.number
        return model

    return Inputs(config, make_model, lambda: One(batch), step.task), step


def task_inputs(
    labelled: Labelled, folder: Path | None, config: BertConfig, tokenizer: Tokenizer, text: list[Path] | None,
    tokens: int, max_seq_length: int, seed: int, steps: int,
) -> Inputs:  # fmt: skip
    """Of a step of fine-tuning, on a new head where the folder has none for such labels."""
    kind, train = labelled.task, labelled.train
    if train is not None:
        examples = read_examples(kind, train, labelled.columns)
        how = ", ".join(filter(None, (f"examples of {train}", note_of(examples))))
    else:
        like = task_of(config, architecture_of(config))
        documents = read_documents(text or [SHIPPED_TEXT])
        examples, how = examples_of_text(kind, documents, max_seq_length, CHARACTERS * tokens * steps, like)
        how = f"labels made from the text: {how}"
    task = task_for(kind, examples, folder)
    most = max(tokens * steps // 3, 2)  # a sequence has three tokens at least
    if len(examples) > most:  # from the whole of the file, which may be in the order of the labels
        examples = examples.subset(np.linspace(0, len(examples) - 1, most).astype(int))

    def make_batches() -> Batches:
        return TaskBatches(task, task.prepare(examples, tokenizer, max_seq_length), tokens, seed)

    def make_model(backend: Backend, dtype: str) -> Any:
        if folder is not None:
            return load_model(task, folder, backend, dtype, seed)[0]
        return task.model_class(with_labels)(with_labels, backend, dtype, seed)

    with_labels = replace(config, **task.labels())
    return Inputs(with_labels, make_model, make_batches, kind, how)


def named_config(name: str, vocabulary: int) -> BertConfig:
    """A named size over a vocabulary, or a checkpoint's config."""
    if name in NAMED:
        return replace(NAMED[name], vocab_size=vocabulary)
    if not name or not Path(name).is_dir():
        raise UserError(f"--config: expected {', '.join(NAMED)} or a checkpoint's folder, got {name!r}")
    return checkpoint.read_config(encoder_folder(name))


def enough(documents: list[Document], tokens: int) -> list[Document]:
    """The first sentences, some more than a batch needs: what is timed is the making of one batch."""
    kept: list[Document] = []
    characters = 0
    for document in documents:
        kept.append([])
        for sentence in document:
            kept[-1].append(sentence)
            characters += len(sentence)
            if characters > CHARACTERS * tokens:
                return kept
    return kept
