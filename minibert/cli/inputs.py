"""The model and the batch that commands take a training step of: a named size or a checkpoint, and real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from minibert.backends import Backend
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
from minibert.model.config import NAMED, BertConfig

SEPARATOR_HELP = (
    f"What separates the documents of a file: {TWO_BLANK_LINES}; {BLANK_LINE}, with a sentence a line, as Google's "
    "BERT takes text; line, where each is a document; file, where nothing does; or what a line reads, as <|endoftext|>."
)


class Inputs(NamedTuple):
    """How the model and the batch of a step are made."""

    config: BertConfig
    make_model: Callable[[Backend, str], Any]  # on a backend, in a dtype
    make_batches: Callable[[], Batches]

    def make_batch(self) -> PackedBatch:
        """The first, from text: what `preprocess` times."""
        return self.make_batches().batch(0)


def step_inputs(
    config: str, text: list[Path] | None, tokens: int, max_seq_length: int, seed: int, steps: int = 1
) -> Inputs:
    """Read what `--config` and `--text` name, text for so many steps. Raises UserError for settings that do not fit."""
    folder = None if config in NAMED else Path(config)
    tokenizer = load_tokenizer(folder if folder and tokenizer_files(folder) else SHIPPED_VOCABULARY)
    model_config = named_config(config, vocabulary_size(tokenizer))
    check_vocabulary(tokenizer, model_config.vocab_size)
    if max_seq_length > model_config.max_position_embeddings:
        raise UserError(
            f"--max-seq-length {max_seq_length}: the model has {model_config.max_position_embeddings} positions; "
            "give that many or fewer"
        )
    documents = enough(read_documents(text or [SHIPPED_TEXT]), tokens * steps)
    rule = masking_rule(special_ids(tokenizer), model_config.vocab_size)

    def make_batches() -> Batches:
        sequences = make_sequences(encode(documents, tokenizer), special_ids(tokenizer), max_seq_length)
        return Batches(sequences, max(tokens, int(sequences.lengths.max())), seed, rule)

    def make_model(backend: Backend, dtype: str) -> Any:
        if folder is None:
            return BertForMaskedLM(model_config, backend, dtype=dtype, seed=seed)
        return BertForMaskedLM.from_pretrained(folder, backend=backend, dtype=dtype, seed=seed)

    return Inputs(model_config, make_model, make_batches)


def named_config(name: str, vocabulary: int) -> BertConfig:
    """A named size over a vocabulary, or a checkpoint's config."""
    if name in NAMED:
        return replace(NAMED[name], vocab_size=vocabulary)
    if not name or not Path(name).is_dir():
        raise UserError(f"--config: expected {', '.join(NAMED)} or a checkpoint's folder, got {name!r}")
    return checkpoint.read_config(name)


def enough(documents: list[Document], tokens: int) -> list[Document]:
    """The first sentences, some more than a batch needs: what is timed is the making of one batch."""
    kept: list[Document] = []
    characters = 0
    for document in documents:
        kept.append([])
        for sentence in document:
            kept[-1].append(sentence)
            characters += len(sentence)
            if characters > 12 * tokens:  # a token is 4 to 5 characters of English
                return kept
    return kept
