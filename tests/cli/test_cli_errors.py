"""Bad input to the command line: one line on standard error that says what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import minibert as mb
from minibert import backends
from minibert.cli import main
from minibert.data import SHIPPED_VOCABULARY
from minibert.kernels.gpu.launch import CudaFile
from minibert.train.checkpoint import STATE
from tests.emulator_device import needs_compiler

SMALL = {
    "vocab_size": 8000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
KERNEL_FILE = str(Path(mb.__file__).parent / "kernels" / "softmax" / "cpu.py")
TEXT = "The Congress met in the city. It was a cold winter, and the members came late.\n\n\nPeace was made.\n" * 20

Refused = Callable[..., str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def config_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SMALL, **changes}), encoding="utf-8")
    return folder


def test_command_as_a_process(tmp_path: Path, root: Path) -> None:
    """The whole way once: interpreter, entry point, exit code."""
    command = [
        sys.executable,
        "-m",
        "minibert",
        "pretrain",
        str(tmp_path / "absent.txt"),
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr == f"error: no file {tmp_path / 'absent.txt'}: check the path\n"
    assert not (tmp_path / "out").exists()


def test_missing_file(refused: Refused, tmp_path: Path) -> None:
    assert "absent.txt" in refused("pretrain", tmp_path / "absent.txt", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "absent.txt" in refused("tokenizer", "train", tmp_path / "absent.txt", "--output", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b" \n\n\t\n", b"... --- ...\n"])
def test_text_without_words(refused: Refused, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty.txt").write_bytes(content)
    assert "has no words" in refused("pretrain", tmp_path / "empty.txt", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    ["Größe".encode("latin-1"), TEXT.encode("utf-16"), TEXT.encode("utf-16-le"), b"\x89PNG\r\n\x1a\n" + bytes(64)],
)
def test_wrong_encoding(refused: Refused, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "other.txt").write_bytes(content)
    message = refused("pretrain", tmp_path / "other.txt", "--output", tmp_path / "out")
    assert "UTF-8" in message and ("byte" in message or "NUL" in message)


def test_text_too_short(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "word.txt").write_text("peace", encoding="utf-8")
    message = refused(
        "pretrain", tmp_path / "word.txt", "--output", tmp_path / "out", "--tokenizer", SHIPPED_VOCABULARY
    )
    assert "more text" in message


def test_vocabulary_that_does_not_fit(refused: Refused, text: Path, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "config", vocab_size=500)
    arguments = ["--config", folder, "--tokenizer", SHIPPED_VOCABULARY, "--max-seq-length", 32]
    message = refused("pretrain", text, "--output", tmp_path / "o", *arguments)
    assert "500" in message and "7999" in message


def test_vocabulary_too_small_for_the_text(refused: Refused, text: Path, tmp_path: Path) -> None:
    assert "vocabulary" in refused("pretrain", text, "--output", tmp_path / "o", "--vocab-size", 6)
    assert "vocabulary" in refused("tokenizer", "train", text, "--output", tmp_path / "o", "--vocab-size", 6)


NOT_UTF8 = "\udcff"  # as Python gives the byte 0xff of an argument


def test_arguments_and_paths_that_are_not_utf8(
    refused: Refused, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "UTF-8" in refused("tokenizer", "show", f"the {NOT_UTF8}")
    assert "no tokenizer at" in refused("tokenizer", "show", "the", "--tokenizer", tmp_path / NOT_UTF8)
    strange, output = text.rename(tmp_path / f"{NOT_UTF8}.txt"), tmp_path / f"words{NOT_UTF8}"
    for command in (
        ["train", strange, "--output", output, "--vocab-size", 100],
        ["show", "a city", "--tokenizer", output / "vocab.txt"],
    ):
        monkeypatch.setattr(sys, "argv", ["minibert", "tokenizer", *map(str, command)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
    assert "85 tokens in" in (said := capsys.readouterr().out) and "[CLS]:2 a:" in said


@pytest.mark.parametrize(
    "words", [("--backend", "numba", "--backends", "numpy"), ("--backend=numpy", "--backend", "numpy")], ids="_".join
)
@pytest.mark.parametrize("command", ["check", "compare", "ops", "watch", "pretrain"])
def test_backends_that_are_named_twice(refused: Refused, command: str, words: tuple[str, ...]) -> None:
    assert "expected --backend once (several backends as in numpy,numba)" in refused(command, "softmax", *words)


@pytest.mark.parametrize(
    ("file", "overwrite", "message"),
    [
        ("vocab.txt", False, "holds a vocabulary, vocab.txt: add --overwrite"),
        ("tokenizer_config.json", False, "holds a vocabulary, tokenizer_config.json"),
        ("model.safetensors", True, "holds a model, model.safetensors"),
        *((f"a.{end}", True, "a model") for end in ("bin", "onnx", "gguf", "ot", "tflite", "pb", "npz", "mlmodel")),
        ("bert_model.ckpt.data-00000-of-00001", True, "holds a model"),
    ],
)
def test_a_vocabulary_or_a_model_is_not_replaced(
    refused: Refused, text: Path, tmp_path: Path, file: str, overwrite: bool, message: str
) -> None:
    (folder := tmp_path / "trained").mkdir()
    (folder / file).write_text("kept")
    arguments = ["--output", folder, "--vocab-size", 100, *(["--overwrite"] if overwrite else [])]
    assert message in refused("tokenizer", "train", text, *arguments)
    assert {path.name: path.read_text() for path in folder.iterdir()} == {file: "kept"}


def test_a_vocabulary_is_replaced_when_that_is_said(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := config_folder(tmp_path / "config")).joinpath("vocab.txt").write_text("old")
    command = ["tokenizer", "train", text, "--output", folder, "--vocab-size", 100, "--overwrite"]
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, command)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert (folder / "vocab.txt").read_text().startswith("[PAD]\n[UNK]\n")
    assert json.loads((folder / "config.json").read_text()) == SMALL


def test_a_line_between_documents_is_no_word_of_the_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    (text := tmp_path / "two.txt").write_text("one document here\n@@\nanother document there\n")
    command = ["tokenizer", "train", text, "--output", tmp_path / "out", "--document-separator"]
    assert "no line" in refused(*command, "##")
    monkeypatch.setattr(sys, "argv", ["minibert", *map(str, command), "@@"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    assert "@" not in (tmp_path / "out" / "vocab.txt").read_text()


def test_weights_without_their_tokenizer(refused: Refused, text: Path, tmp_path: Path) -> None:
    (folder := config_folder(tmp_path / "config")).joinpath("model.safetensors").write_bytes(b"")
    message = refused("pretrain", text, "--output", tmp_path / "o", "--config", folder, "--max-seq-length", 32)
    assert "holds weights but no tokenizer" in message and "--tokenizer" in message


def test_config_value_of_the_wrong_type(refused: Refused, text: Path, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "config", hidden_size="64")
    message = refused("pretrain", text, "--output", tmp_path / "o", "--config", folder)
    assert "expected hidden_size to be int, got str '64'" in message and "config.json" in message


def test_weights_in_a_pickle_are_not_left_aside(refused: Refused, text: Path, tmp_path: Path) -> None:
    """A folder with a config alone is a new model; one with weights that cannot be read is not."""
    folder = config_folder(tmp_path / "config")
    (folder / "pytorch_model.bin").write_bytes(b"")
    arguments = ["--config", folder, "--tokenizer", SHIPPED_VOCABULARY, "--max-seq-length", 32]
    assert "pytorch_model.bin" in refused("pretrain", text, "--output", tmp_path / "o", *arguments)


def test_unknown_dtype_before_a_vocabulary_is_trained(
    refused: Refused, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minibert.cli.pretrain.choose_tokenizer", lambda *given: pytest.fail("it was"))
    message = refused("pretrain", text, "--output", tmp_path / "o", "--dtype", "nonsense")
    assert "float32" in message and "'nonsense'" in message


def test_unknown_config(refused: Refused, text: Path, tmp_path: Path) -> None:
    assert "gigantic" in refused("pretrain", text, "--output", tmp_path / "o", "--config", "gigantic")


def test_broken_config(refused: Refused, text: Path, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "config")
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert "JSON" in refused("pretrain", text, "--output", tmp_path / "o", "--config", folder)


def test_unknown_backend(refused: Refused, text: Path, tmp_path: Path) -> None:
    message = refused("pretrain", text, "--output", tmp_path / "o", "--backend", "quantum")
    assert "'quantum'" in message and "numba" in message


def test_backend_without_its_hardware(
    refused: Refused, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_an_absent_gpu.py").write_text("raise ImportError('no GPU was found')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(backends.BUILT_IN, "gpu", "module_of_an_absent_gpu")
    message = refused("pretrain", text, "--output", tmp_path / "o", "--backend", "gpu")
    assert "no GPU was found" in message and "to mend it" in message


@pytest.mark.parametrize("length", [65, 600])
def test_sequences_longer_than_the_positions(refused: Refused, text: Path, tmp_path: Path, length: int) -> None:
    folder = config_folder(tmp_path / "config")
    message = refused("pretrain", text, "--output", tmp_path / "o", "--config", folder, "--max-seq-length", length)
    assert str(length) in message and "64 positions" in message


def test_sequences_longer_than_the_positions_of_a_named_model(refused: Refused, text: Path, tmp_path: Path) -> None:
    assert "512 positions" in refused("pretrain", text, "--output", tmp_path / "o", "--max-seq-length", 600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["check", "add", "--backend", "numpy", "--dtype"], "not ''"),
        (["diff", "numpy", "numpy", "--b-dtype"], "not ''"),
        (["bisect", "numpy", "numpy", "--b-dtype"], "not ''"),
        (["watch", KERNEL_FILE, "--once", "--backend"], "no backend is called ''"),
        (["watch", KERNEL_FILE, "--once", "--dtype"], "not ''"),
    ],
)
def test_an_option_that_is_given_empty_is_not_left_out(refused: Refused, words: list[str], message: str) -> None:
    """As by a script whose variable is not set: it asked for something else than the default."""
    assert message in refused(*words, "")


def test_sequences_longer_than_the_batch(refused: Refused, text: Path, tmp_path: Path) -> None:
    arguments = ["--tokenizer", SHIPPED_VOCABULARY, "--config", "tiny", "--tokens-per-batch", 8]
    assert "tokens_per_batch" in refused("pretrain", text, "--output", tmp_path / "o", *arguments)


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--steps", -5, "max_steps"),
        ("--steps", 0, "max_steps"),
        ("--steps", "many", "--steps"),
        ("--learning-rate", -0.1, "learning_rate"),
        ("--learning-rate", "nan", "learning_rate"),
        ("--tokens-per-batch", -1, "tokens_per_batch"),
        ("--max-seq-length", -3, "max_seq_length"),
        ("--warmup-steps", -1, "warmup_steps"),
        ("--save-every", 0, "save_steps"),
        ("--held-out", 2, "held_out"),
        ("--seed", -1, "seed"),
        ("--threads", -1, "threads"),
        ("--threads", 0, "threads"),
        ("--hidden", -64, "--hidden"),
        ("--layers", 0, "--layers"),
        ("--layers", 10**8, "--layers"),
        ("--vocab-size", -1, "--vocab-size"),
        ("--threads", 10**20, "--threads"),
        ("--dtype", "float16", "float16"),
        ("--tokenizer", "absent", "absent"),
        ("--document-separator", "=====", "no line of"),
        ("--document-separator", "", "document separator"),
        ("--config", "", "config.json"),
        ("--dtype", "", "dtype: backend"),
        ("--backend", "", "no backend is called ''"),
    ],
)
def test_values_out_of_range(
    refused: Refused, text: Path, tmp_path: Path, option: str, value: object, name: str
) -> None:
    before = ("--tokenizer", SHIPPED_VOCABULARY) if option not in ("--vocab-size", "--tokenizer") else ()
    assert name in refused("pretrain", text, "--output", tmp_path / "o", *before, option, value)
    assert not (tmp_path / "o").exists()


def test_output_that_cannot_be_written(refused: Refused, text: Path, tmp_path: Path) -> None:
    arguments = ["--tokenizer", SHIPPED_VOCABULARY, "--config", "tiny"]
    assert "is a file" in refused("pretrain", text, "--output", text, *arguments)
    assert "cannot write" in refused("pretrain", text, "--output", text / "below", *arguments)
    assert "cannot write" in refused("tokenizer", "train", text, "--output", text / "below", "--vocab-size", 200)


def test_output_that_is_not_empty(refused: Refused, text: Path, tmp_path: Path) -> None:
    assert "not empty" in refused("pretrain", text, "--output", tmp_path)
    assert text.read_text(encoding="utf-8") == TEXT


def test_resume_without_a_checkpoint(refused: Refused, text: Path, tmp_path: Path) -> None:
    assert "nothing to resume" in refused("pretrain", text, "--output", tmp_path, "--resume")
    assert "nothing to resume" in refused("pretrain", text, "--output", tmp_path / "absent", "--resume")


@pytest.fixture
def finished(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """The folder of a run of two steps."""
    folder = config_folder(tmp_path / "config")
    arguments = ["--config", folder, "--tokenizer", SHIPPED_VOCABULARY, "--steps", 2, "--max-seq-length", 32,
                 "--tokens-per-batch", 128, "--backend", "numpy"]  # fmt: skip
    monkeypatch.setattr(
        sys, "argv", ["minibert", "pretrain", str(text), "--output", str(tmp_path / "run"), *map(str, arguments)]
    )
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_resume_from_a_damaged_state(refused: Refused, finished: Path) -> None:
    """And no checkpoint before it; with one see tests/train/test_checkpoint.py."""
    shutil.rmtree(finished / "checkpoint-0")
    state = finished / "checkpoint-2" / STATE
    whole = state.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 7, 0):
        state.write_bytes(whole[:size])
        assert STATE in refused("pretrain", "--output", finished, "--resume", "--steps", 4)
    state.write_bytes((finished / "model.safetensors").read_bytes())
    assert STATE in refused("pretrain", "--output", finished, "--resume", "--steps", 4)


def test_weights_that_are_damaged(refused: Refused, finished: Path, text: Path, tmp_path: Path) -> None:
    weights = finished / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    arguments = ["--output", tmp_path / "next", "--config", finished, "--max-seq-length", 32]
    assert "model.safetensors" in refused("pretrain", text, *arguments)


def test_weights_of_another_vocabulary(refused: Refused, finished: Path, text: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    (finished / "config.json").write_text(json.dumps({**config, "vocab_size": 9000}), encoding="utf-8")
    arguments = ["--output", tmp_path / "next", "--config", finished, "--max-seq-length", 32]
    assert "9000" in refused("pretrain", text, *arguments)


def test_options_that_a_folder_would_make_idle(refused: Refused, finished: Path, text: Path, tmp_path: Path) -> None:
    output, words = tmp_path / "next", tmp_path / "vocab.txt"
    command = ["pretrain", text, "--output", output, "--max-seq-length", 32, "--config", finished]
    assert f"--config {finished} holds one" in refused(*command, "--vocab-size", 50)
    assert "--tokenizer names one" in refused(*command, "--vocab-size", 50, "--tokenizer", SHIPPED_VOCABULARY)
    assert "--layers" in refused(*command, "--layers", 2)
    assert "--hidden" in refused(*command, "--hidden", 64)
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]))
    assert "another vocabulary than the weights" in refused(*command, "--tokenizer", words)
    assert "--graph" in refused(*command, "--graph", "--backend", "numpy")
    assert not output.exists()


def test_resume_of_another_run(refused: Refused, finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("winter", "summer"), encoding="utf-8")
    assert "the text" in refused("pretrain", other, "--output", finished, "--resume")
    assert "learning_rate" in refused("pretrain", "--output", finished, "--resume", "--learning-rate", 0.5)
    assert "dtype" in refused("pretrain", "--output", finished, "--resume", "--dtype", "float64")
    assert "config" in refused("pretrain", "--output", finished, "--resume", "--config", "base")
    assert "layers" in refused("pretrain", "--output", finished, "--resume", "--layers", 3)


@pytest.mark.parametrize(
    ("spec", "told"),
    [("mine.py", "FILE.py:FUNCTION=OP"), ("absent.py:f=softmax", "absent.py"), ("absent.py:f=softmacks", "softmacks")],
)
def test_kernel_that_is_not_there(refused: Refused, text: Path, tmp_path: Path, spec: str, told: str) -> None:
    assert told in refused("pretrain", text, "--output", tmp_path / "o", "--kernel", spec)


def test_unknown_command_and_option(refused: Refused, tmp_path: Path) -> None:
    assert "pretrian" in refused("pretrian")
    assert "--outptu" in refused("pretrain", "--outptu", tmp_path)
    assert "--output" in refused("pretrain")


@pytest.mark.parametrize("wrong", [8000, -1, 2**31])
def test_token_ids_out_of_range(wrong: int) -> None:
    model = mb.BertForMaskedLM(mb.BertConfig(**SMALL), backend="numpy")
    with pytest.raises(mb.UserError, match=rf"input_ids: {wrong} is out of range; expected 0 \.\. 7999"):
        model(input_ids=np.array([[2, wrong, 3]]))
    with pytest.raises(mb.UserError, match="labels"):
        model(input_ids=np.array([[2, 5, 3]]), labels=np.array([[-100, wrong, -100]]))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--gdb", ""), "--gdb: expected FILE:LINE"),
        (("--gdb", "gpu.cu"), "--gdb: expected FILE:LINE"),
        (("--schedules", ""), "--schedules: expected some of"),
    ],
)
@needs_compiler
def test_options_of_the_emulator(refused: Refused, options: tuple[str, ...], told: str) -> None:
    assert told in refused("check", "softmax", "--backend", "emulator", *options)


@needs_compiler
def test_an_emulator_that_does_not_compile_fails_no_check(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    assert "false ended with exit status 1" in refused("check", "softmax", "--backend", "emulator")


def test_launches_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "k.cu").write_text('extern "C" __global__ void k(float* y) {}')
    file = CudaFile(str(tmp_path / "k.py"), "k.cu")
    kernel = file.kernel("k", block=32)
    device = object()
    for grid in (1.5, "3", -1, (1, 1, 1, 1), (1, 70000), (), True):
        with pytest.raises(TypeError, match="kernel k: grid is one to three numbers of blocks"):
            kernel(None, grid=grid, on=device)
    for shared in (-4, 4.0):
        with pytest.raises(TypeError, match="kernel k: shared is a number of bytes"):
            kernel(None, grid=1, shared=shared, on=device)
    with pytest.raises(TypeError, match="no argument is a device array"):
        kernel(None, grid=1)
    with pytest.raises(ValueError, match=r'has no kernel .*Kernels are written extern "C" __global__ void'):
        file.kernel("j", block=32)
