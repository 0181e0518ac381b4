"""Texts, lines and words of any length: time grows as they do, and memory stays small."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minibert.data import SHIPPED_VOCABULARY, encode, load_tokenizer, train_tokenizer
from minibert.data import text as text_module
from minibert.data.sequences import ids_and_spans
from minibert.data.text import SEPARATORS, documents_of, split_sentences

LENGTH = 3_000
LONG: dict[str, Callable[[int], str]] = {
    "dots": lambda n: "Hello. " + "." * n + "x",
    "marks": lambda n: "Hello. " + ". " * (n // 2) + "x",
    "quotes": lambda n: "Hello." + '"' * n + "x",
    "brackets": lambda n: "A. " + "(" * n + "x",
    "spaces": lambda n: "a" + " " * n + "b",
    "line ends": lambda n: "a" + "\n " * (n // 2) + "b",
    "one word": lambda n: "a" * n,
    "Chinese": lambda n: "中。" * (n // 2),
    "accents": lambda n: "a" + "\u0301" * n,
}


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, of the quickest of three: another process beside takes none of them."""
    taken = []
    for _ in range(3):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return min(taken)


@pytest.mark.parametrize("kind", LONG)
def test_time_grows_with_the_text_and_not_with_its_square(kind: str) -> None:
    tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
    short, long = LONG[kind](LENGTH), LONG[kind](16 * LENGTH)

    def split(text: str) -> None:
        for separator in SEPARATORS:
            list(documents_of(text.splitlines(keepends=True), separator))

    for work in (split, lambda text: encode([[text]], tokenizer), lambda text: train_tokenizer([[text]], 100)):
        once, grown = seconds(lambda work=work: work(short)), seconds(lambda work=work: work(long))  # type: ignore[misc]
        assert grown < 16 * 4 * max(once, 0.003), f"16 times the text took {grown / once:.0f} times as long"


MEMORY = """
import resource, sys
from minibert.data import SHIPPED_VOCABULARY, encode, load_tokenizer, read_documents
tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
encode(read_documents(sys.argv[1]), tokenizer)
print((peak() - before) * 1024)
"""


@pytest.mark.parametrize("unit", ["a", "中文字", "the hill is steep "])
def test_memory_is_some_times_the_text(unit: str, tmp_path: Path) -> None:
    """The tokenizer's own results are 100 to 500 bytes a character: of 2 million characters 200 to 1000 MB."""
    path = tmp_path / "long.txt"
    path.write_text(unit * (2_000_000 // len(unit)), encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", MEMORY, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 180e6


def test_pieces_have_the_tokens_and_places_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
    text = "The  Senate met, and the House\tdid too; 中文 was spoken. " * 5
    whole = tokenizer.encode(text, add_special_tokens=False)
    monkeypatch.setattr(text_module, "LONGEST_PIECE", 20)
    ids, spans = ids_and_spans(text, tokenizer)
    assert ids.tolist() == whole.ids
    np.testing.assert_array_equal(spans, whole.offsets)
    assert split_sentences("One  two\n" * 30) == ["One two " * 29 + "One two"]


def test_a_word_too_long_for_a_token_is_not_trained_on() -> None:
    words = ["the", "hill", "hills"] * 20
    plain = train_tokenizer([[" ".join(words)]], 60).get_vocab()
    assert train_tokenizer([[" ".join([*words, "zq" * 60])]], 60).get_vocab() == plain
