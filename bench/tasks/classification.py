"""Texts by class: `python -m bench.tasks.classification --json FILE`, `--set bbc`, `--peft lora`, `--small`.

Accuracy, seconds, share of peak and memory of MiniLM fine-tuned by minibert and by transformers with torch, mean of
three seeds: on the 5452 questions that TREC's classifier was trained on (Li, Roth 2002), six labels (trec); on 2225
news of the BBC, five topics, long texts (bbc); on the 6046 mails of SpamAssassin's public corpus (spam).
"""

from __future__ import annotations

from bench.tasks import texts
from bench.tasks.run import Task, classify, command
from bench.timing import harness

TASK = Task(
    "classification", "Fine-tune on questions, news or mails, ours beside transformers and torch.",
    {"trec": texts.TREC, "bbc": texts.BBC, "spam": texts.SPAM}, classify, ("accuracy",),
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
