"""Names in sentences: `python -m bench.tasks.tagging --json FILE`, `--set conll2003`, `--small`.

F1 over entities, as seqeval and CoNLL's script count them, of MiniLM fine-tuned by minibert and by transformers with
torch, mean of three seeds: on the 2394 tweets that WNUT-16 was trained on (wnut16), on the 14,041 sentences of
CoNLL-2003 (conll2003).
"""

from __future__ import annotations

from pathlib import Path

from bench.tasks import words
from bench.tasks.run import Task, command
from bench.timing import harness
from minibert.tasks.metrics import seqeval_metrics
from minibert.tasks.task import Tag
from minibert.tasks.words import WordExamples


def tag(examples: WordExamples, folder: Path) -> Tag:
    seqeval_metrics()  # that it is missing is told before the run
    return Tag(examples.label_names())


TASK = Task(
    "tagging", "Fine-tune on sentences with names, ours beside transformers and torch.",
    {"wnut16": words.WNUT16, "conll2003": words.CONLL2003}, tag, ("entity_f1", "entity_f1_strict"), 2e-4,
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
