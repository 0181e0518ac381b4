"""How good a sentence of a review is, from -4 to 4: `python -m bench.tasks.regression --json FILE`, `--small`.

The 10,605 movie snippets that VADER was judged by (Hutto, Gilbert 2014): Pearson's correlation with people's mean
rating, seconds, share of peak and memory of MiniLM fine-tuned by minibert and by transformers with torch.
"""

from __future__ import annotations

from bench.tasks import texts
from bench.tasks.run import Task, classify, command
from bench.timing import harness

TASK = Task(
    "regression", "Fine-tune on VADER's movie snippets, ours beside transformers and torch.",
    {"vader": texts.VADER}, classify, ("pearson",),
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
