"""Questions about contexts made from a dictionary, in SQuAD's format: no package index has such a set of any size.

A context is five entries `headword: gloss.`; a question is a gloss, its answer the headword. A third of the questions
are about an entry that is left out: they have no answer. No entry is in two contexts, so that nothing by which is
judged was trained on.
"""

from __future__ import annotations

import json
import re

import numpy as np

from bench.tasks.fetch import Archive, Published, inside
from minibert.tasks.questions import read_questions

ENTRIES = 5  # of a context
UNANSWERABLE = 1 / 3  # as in SQuAD 2.0's training set
SEED = 0
WORDS = range(4, 21)  # that a gloss may have
MOST = 6000  # questions
SYNSET = re.compile(r"\d{8} \d\d n [0-9a-f]{2} (\S+) .*\| ([^;\"]+)")


def entries_of(file: bytes) -> list[tuple[str, str]]:
    """Headword and gloss of WordNet's nouns, each headword and each gloss once: wndb(5WN).

    The gloss without its examples and further parts. One that holds its headword would tell too much.
    """
    found: dict[str, str] = {}
    for line in file.decode("latin-1").splitlines():
        if match := SYNSET.match(line):
            word, gloss = match[1].replace("_", " "), match[2].strip()
            if len(gloss.split()) in WORDS and word.lower() not in gloss.lower():
                found.setdefault(word, gloss)
    return list({gloss: (word, gloss) for word, gloss in found.items()}.values())


def squad(entries: list[tuple[str, str]]) -> bytes:
    """The document: a question for each context, drawn by SEED."""
    rng = np.random.default_rng(SEED)
    order = rng.permutation(len(entries)).tolist()
    paragraphs = []
    while len(order) > ENTRIES and len(paragraphs) < MOST:
        chosen = [entries[order.pop()] for _ in range(ENTRIES)]
        word, gloss = entries[order.pop()] if rng.random() < UNANSWERABLE else chosen[rng.integers(ENTRIES)]
        context, starts = "", {}
        for other, text in chosen:
            starts[other] = len(context)
            context += f"{other}: {text}. "
        answers = [{"text": word, "answer_start": starts[word]}] if word in starts else []
        question = {
            "id": str(len(paragraphs)), "question": gloss, "answers": answers, "is_impossible": not answers,
        }  # fmt: skip
        paragraphs.append({"context": context.strip(), "qas": [question]})
    return json.dumps({"version": "2.0", "data": [{"title": "", "paragraphs": paragraphs}]}).encode()


def from_wordnet(package: bytes) -> bytes:
    return squad(entries_of(inside("data.tar", "./usr/share/wordnet/data.noun")(package)))


# WordNet 3.0 of Princeton University, whose licence lets it be used for any purpose.
WORDNET = Published(
    (
        Archive(
            "http://deb.debian.org/debian/pool/main/w/wordnet", "wordnet-base_3.0-37_all.deb",
            "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ),
    ),
    "wordnet-questions.json", from_wordnet, read_questions, 64,
)  # fmt: skip
