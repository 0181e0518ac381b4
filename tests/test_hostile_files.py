"""Damaged and hostile files: each is read, or refused in a line (tests/torture/files.py has what is tried)."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.data import load_tokenizer
from minibert.data.panics import no_panic
from minibert.data.sequences import ids_of
from minibert.errors import UserError
from tests.torture import corpus
from tests.torture.files import NASTY, torture

MUTANTS = int(os.environ.get("MINIBERT_MUTANTS", "1500"))


@pytest.mark.skipif(os.name != "posix", reason="limits of memory and time are POSIX's")
def test_mutated_files_are_read_or_refused_in_a_line() -> None:
    counts, failures = torture(MUTANTS, seed=1)
    assert not failures, "\n".join(map(str, failures[:5]))
    assert min(counts.values()) > MUTANTS // 10  # neither do all pass, nor are all refused at the door


def changed(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("hidden_size", 2 * 10**8), ("num_labels", 10**9)]
)
def test_what_a_config_asks_for_is_compared_with_the_weights_first(tmp_path: Path, key: str, value: int) -> None:
    corpus.make_model(tmp_path)
    changed(tmp_path / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(UserError, match=key):
        mb.BertForMaskedLM.from_pretrained(tmp_path, backend="numpy")


def test_more_layers_than_the_weights_have_are_still_drawn(tmp_path: Path) -> None:
    corpus.make_model(tmp_path)
    changed(tmp_path / "config.json", lambda config: config.update(num_hidden_layers=4))
    with pytest.warns(UserWarning, match="newly initialised"):
        mb.BertForMaskedLM.from_pretrained(tmp_path, backend="numpy")


def test_a_panic_of_the_tokenizers_library_is_an_error_in_a_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus.make_tokenizer(tmp_path)
    changed(tmp_path / "tokenizer.json", lambda content: content["post_processor"]["special_tokens"].clear())
    with pytest.raises(UserError, match=r"fails on .*tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == "", "what the library printed itself"


@pytest.mark.parametrize("fails", [False, True])
def test_what_others_write_while_a_tokenizer_is_loaded_comes_afterwards(
    fails: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(ValueError, match="no panic"))
        stack.enter_context(no_panic("loading", silent=True))
        os.write(2, b"of another thread\n")
        assert capfd.readouterr().err == ""
        if fails:
            raise ValueError("no panic")
    assert capfd.readouterr().err == "of another thread\n"


def test_a_panic_in_the_middle_of_a_text_is_one_too() -> None:
    panic = type("PanicException", (BaseException,), {})

    class Panics:
        def encode_batch(self, *_: Any, **__: Any) -> None:
            raise panic("index out of\nbounds")

    with pytest.raises(UserError, match="fails on this text: index out of bounds"):
        list(ids_of(["a text"], Panics()))  # type: ignore[arg-type]


def test_an_id_that_is_far_too_large_is_refused_before_the_library_counts_to_it(tmp_path: Path) -> None:
    corpus.make_tokenizer(tmp_path)
    changed(tmp_path / "tokenizer.json", lambda content: content["model"]["vocab"].update({"##i": 10**9}))
    with pytest.raises(UserError, match="expected ids below"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["step", "tokens", "seconds", "since", "fingerprint"])
def test_what_a_state_says_of_its_progress_is_checked(name: str) -> None:
    from minibert.train.checkpoint import checked_progress

    progress = {"step": 2, "tokens": 9, "seconds": 0.5, "since": {"loss": 1.5}, "fingerprint": 7}
    assert checked_progress(progress) == progress
    wrong = [value for value in NASTY if not isinstance(value, int | float) or isinstance(value, bool)]
    for value in (*wrong, float("nan")):
        if name == "since" and value == {}:
            continue
        with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
            checked_progress({**progress, name: value})
    np.testing.assert_equal(checked_progress(progress), progress)
