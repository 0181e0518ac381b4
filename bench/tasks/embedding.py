"""Vectors of sentences: `python -m bench.tasks.embedding --json FILE`, `--small`.

MiniLM trained by contrast on the questions and answers of a FAQ (`sentences.py`), by minibert and by
sentence-transformers, whose MultipleNegativesRankingLoss both lower: how high the answer to a question stands among all
that are held out, before and after; and how well cosines follow people's ratings of 50 news that nobody trained on
(Spearman's correlation over their 1225 pairs).
"""

from __future__ import annotations

import numpy as np
from tokenizers import Tokenizer

from bench.tasks import sentences
from bench.tasks.fetch import examples_in, fetched
from bench.tasks.given import Beside
from bench.tasks.run import Task, command
from bench.timing import harness
from minibert.tasks.embedding_task import Embed
from minibert.tasks.encoding import encode_texts
from minibert.tasks.metrics import Figures, similarity_metrics
from minibert.tasks.task import Prepared
from minibert.tasks.task import Task as Tuned


def news(tuned: Tuned, tokenizer: Tokenizer, length: int) -> Beside:
    """Lee's documents; the correlations of cosines and ratings over all pairs of them."""
    rated: sentences.Rated = examples_in(sentences.LEE, fetched(sentences.LEE, option=""))
    encoded = encode_texts(tokenizer, rated.documents, None, length)
    pairs = np.triu_indices(len(rated), 1)

    def figures(vectors: np.ndarray) -> Figures:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return similarity_metrics(rated.similarities[pairs], (unit @ unit.T)[pairs]).figures

    return Beside(Prepared(rated, encoded.sequences, None, encoded, ()), figures)


TASK = Task(
    "embedding", "Train an encoder of sentences on questions and answers, ours beside sentence-transformers.",
    {"faq": sentences.FAQ}, Embed.of, ("mrr_10", "recall_1", "spearman"), beside=news,
    others=("torch", "sentence_transformers"), needs=("[parity]", "sentence-transformers"),
)  # fmt: skip
bench = command(TASK)

if __name__ == "__main__":
    harness.run_main(bench)
