"""From raw text to packed batches: documents, WordPiece tokens, sequences, token budgets, masked positions.

    documents = read_documents(["speeches.txt"])                      # text.py
    tokenizer = load_tokenizer("folder")                              # tokenizer.py
    train, held_out = split(encode(documents, tokenizer), 0.05, seed) # sequences.py
    sequences = make_sequences(train, special_ids(tokenizer), max_seq_length=128)
    rule = masking_rule(special_ids(tokenizer), vocab_size)           # masking.py
    batch = Batches(sequences, tokens_per_batch=4096, seed=seed, masking=rule).batch(step)  # batching.py

Integers throughout, and every random draw is named by (seed, stream, step): the same data on every machine.
"""

from minibert.data.batching import Batches, PackedBatch, pad
from minibert.data.masking import (
    MASKING_STREAM,
    SHUFFLE_STREAM,
    MaskingRule,
    continuing_pieces,
    mask_tokens,
    masking_rule,
)
from minibert.data.sequences import Sequences, encode, make_sequences, split
from minibert.data.text import SHIPPED_TEXT, Document, read_documents
from minibert.data.tokenizer import (
    SHIPPED_VOCABULARY,
    SpecialIds,
    check_vocabulary,
    load_tokenizer,
    save_tokenizer,
    special_ids,
    tokenizer_files,
    vocabulary_size,
)
from minibert.data.wordpiece import train_tokenizer

__all__ = [
    "MASKING_STREAM",
    "SHIPPED_TEXT",
    "SHIPPED_VOCABULARY",
    "SHUFFLE_STREAM",
    "Batches",
    "Document",
    "MaskingRule",
    "PackedBatch",
    "Sequences",
    "SpecialIds",
    "check_vocabulary",
    "continuing_pieces",
    "encode",
    "load_tokenizer",
    "make_sequences",
    "mask_tokens",
    "masking_rule",
    "pad",
    "read_documents",
    "save_tokenizer",
    "special_ids",
    "split",
    "tokenizer_files",
    "train_tokenizer",
    "vocabulary_size",
]
