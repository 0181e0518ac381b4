"""Names in tweets: `python -m bench.tasks.tagging --json FILE`, `--small`.

The 2394 tweets that WNUT-16 was trained on (Strauss et al. 2016), names of ten kinds: F1 over entities, as seqeval and
CoNLL's script count them, of MiniLM fine-tuned by minibert and by transformers with torch.
"""

from __future__ import annotations

from bench.tasks import words
from bench.tasks.run import Task, command
from bench.timing import harness
from minibert.tasks.metrics import seqeval_metrics
from minibert.tasks.task import Tag


def task(examples: words.WordExamples) -> Tag:
    seqeval_metrics()  # that it is missing is told before the run
    return Tag(examples.label_names())


TASK = Task(
    "tagging", "Fine-tune on WNUT-16's tweets, ours beside transformers and torch.",
    {"wnut16": words.WNUT16}, task, ("entity_f1", "entity_f1_strict"), 2e-4,
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
