"""Pairs of texts, and texts whose likeness people rated.

FAQ: "Swedish Construction FAQ", 503 questions and answers in English, by Zaragoza AB, CC BY 4.0. Lee: 50 short news,
each pair rated for how alike they are (Lee, Pincombe, Welsh 2005, "An empirical evaluation of models of text document
similarity"). The split of the first is fixed as that of `texts.py`; the second is judged by alone.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.tasks.fetch import Archive, Published, inside
from minibert.errors import UserError
from minibert.tasks.examples import read_texts


def questions_and_answers(wheel: bytes) -> bytes:
    """JSON lines of `question` and `answer`."""
    document = json.loads(inside("zaragoza_construction_faq/data/faq-en.json")(wheel))
    pairs = ({"question": each["q"], "answer": each["a"]} for each in document["questions"])
    return "".join(json.dumps(pair) + "\n" for pair in pairs).encode()


class Rated(NamedTuple):
    """D documents, and how alike people found them, (D, D) from 0 to 1."""

    documents: list[str]
    similarities: np.ndarray

    def __len__(self) -> int:
        return len(self.documents)


def rated_documents(package: bytes) -> bytes:
    """JSON of `documents`, a line each in lee.cor, and `similarities`, of which the file has those above the diagonal
    and on it.
    """
    folder = "gensim-4.4.0/gensim/test/test_data/"
    documents = inside(f"{folder}lee.cor")(package).decode("latin-1").split("\n")
    rows = inside(f"{folder}similarities0-1.txt")(package).decode().splitlines()
    ratings = [[float(cell) for cell in row.split()] for row in rows]
    return json.dumps({"documents": [text for text in documents if text.strip()], "similarities": ratings}).encode()


def read_rated(path: Path) -> Rated:
    """Raises UserError for a file of another form."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        documents, ratings = [str(text) for text in found["documents"]], np.array(found["similarities"], np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.name}: expected documents and their similarities as JSON, got {error!r}") from None
    if ratings.shape != (len(documents), len(documents)):
        raise UserError(f"{path.name}: expected a similarity for each two of {len(documents)}, got {ratings.shape}")
    return Rated(documents, ratings)


FAQ = Published(
    (
        Archive(
            "zaragoza-construction-faq", "zaragoza_construction_faq-1.2.1-py3-none-any.whl",
            "716a1999dd5ad8494c6a4e47d3510f017aa767ea9e55d3b348b0ad70b0e8d3d7",
        ),
    ),
    "construction-faq.jsonl", questions_and_answers, partial(read_texts, task="embed"), 256,
)  # fmt: skip
LEE = Published(
    (
        Archive(
            "gensim", "gensim-4.4.0.tar.gz", "a3f5b626da5518e79a479140361c663089fe7998df8ba52d56e1ded71ac5bdf5"
        ),
    ),
    "lee.json", rated_documents, read_rated, 256,
)  # fmt: skip
