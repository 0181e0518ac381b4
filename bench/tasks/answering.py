"""Answers in a context, or none: `python -m bench.tasks.answering --json FILE`, `--small`.

6000 questions made from WordNet (`dictionary.py`), a third of them without an answer; contexts are cut into windows
that overlap. Exact match and F1 by SQuAD's rules of MiniLM fine-tuned by minibert and by transformers with torch. From
the logits to the answers both go the same way: the windows, the n-best spans and the null answer are minibert's, which
has transformers' rules. `--data FILE` takes any file of SQuAD's format.
"""

from __future__ import annotations

from bench.tasks import dictionary
from bench.tasks.run import Task, command
from bench.timing import harness
from minibert.tasks.task import Answer

TASK = Task(
    "answering", "Fine-tune on questions made from a dictionary, ours beside transformers and torch.",
    {"wordnet": dictionary.WORDNET}, lambda examples, folder: Answer(), ("exact_match", "f1"), 2e-4,
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
