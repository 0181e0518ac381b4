"""What software is for, several labels a text: `python -m bench.tasks.multilabel --json FILE`, `--small`.

The 9199 descriptions of Debian's packages that have one of 102 tags or more of use, works-with, field, interface and
the like: F1 over all labels (micro) and its mean by label (macro) of MiniLM fine-tuned by minibert and by transformers
with torch, beside a linear model on TF-IDF.
"""

from __future__ import annotations

from bench.tasks import texts
from bench.tasks.run import Task, classify, command
from bench.timing import harness

TASK = Task(
    "multilabel", "Fine-tune on the tags of Debian's packages, ours beside transformers and torch.",
    {"debian": texts.DEBIAN_TAGS}, classify, ("f1_micro", "f1_macro"), 3e-4,
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
