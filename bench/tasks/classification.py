"""Questions by what they ask for: `python -m bench.tasks.classification --json FILE`, `--peft lora`, `--small`.

The 5452 questions that TREC's classifier was trained on (Li, Roth 2002), six labels: accuracy, seconds, share of peak
and memory of MiniLM fine-tuned by minibert and by transformers with torch; mean of three seeds.
"""

from __future__ import annotations

from bench.tasks import data
from bench.tasks.run import Task, command
from bench.timing import harness

TASK = Task("classification", "Fine-tune on TREC's questions, ours beside transformers and torch.", data.TREC)
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
