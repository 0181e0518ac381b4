"""The log of a run in its two forms: JSON lines, and event files of TensorBoard."""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert.cli import main
from minibert.data import SHIPPED_TEXT, continuing_pieces, read_documents, train_tokenizer
from minibert.errors import UserError, pip_install
from minibert.model.bert import BertForMaskedLM
from minibert.train import TrainingConfig, read_log
from minibert.train.log import LOG, add_line, forget_after
from minibert.train.loop import read_state
from minibert.train.tensorboard import PREFIX, EventFile, crc32c
from minibert.train.trainer import Data, Trainer, prepare
from tests.event_files import event_files, logged, points_in
from tests.small_steps import SMALL

# --- JSON lines


def refuse_constant(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    add_line(tmp_path, {"step": 1, "loss": 0.5})
    add_line(tmp_path, {"step": 2, "loss": math.nan, "by": {"a": [1.5, -math.inf]}, "name": "b"})
    first, second = (
        json.loads(line, parse_constant=refuse_constant) for line in (tmp_path / LOG).read_text().splitlines()
    )
    assert first == {"step": 1, "loss": 0.5}
    assert second == {"step": 2, "loss": None, "by": {"a": [1.5, None]}, "name": "b", "nonfinite": True}


@pytest.mark.parametrize("torn", [b"", b'{"step": 3, "lo', b'{"step": 3}', b"\xff\x00"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: bytes) -> None:
    whole = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n'
    (tmp_path / LOG).write_bytes(whole + torn)
    records = read_log(tmp_path)
    assert [record["step"] for record in records] == [1, 2] and math.isnan(records[1]["loss"]), "as older runs wrote it"
    forget_after(tmp_path, 2)
    assert (tmp_path / LOG).read_bytes() == whole
    forget_after(tmp_path, 1)
    assert (tmp_path / LOG).read_bytes() == whole.splitlines(keepends=True)[0]


@pytest.mark.parametrize(
    ("line", "content"),
    [(1, b"garbage\n"), (1, b"\xff\xfe\n{}\n"), (2, b'{"step": 0}\n{"loss": 1}\n'),
     (2, b'{"step": 0}\n3\n{"step": 2}\n'), (1, b'{"step": "one"}\n'), (1, b'{"step": Infinity}\n'),
     (2, b'{"step": 0}\n\n'), (1, b"[]\n")],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: int, content: bytes) -> None:
    (tmp_path / LOG).write_bytes(content)
    for read in (read_log, lambda folder: forget_after(folder, 2)):
        with pytest.raises(UserError, match=f"{LOG}, line {line} is no record of a step"):
            read(tmp_path)
    assert (tmp_path / LOG).read_bytes() == content


def test_a_log_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"cannot read .*{LOG}"):
        read_log(tmp_path)
    forget_after(tmp_path, 1)


# --- event files


def test_checksum_is_crc_32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4, and the CRC catalogue's check value
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_events_hold_what_was_logged(tmp_path: Path) -> None:
    file = EventFile(tmp_path, 300)
    file.scalars(
        2**40, {"step": 7, "loss": 0.1, "eval_loss": math.nan, "flag": True, "by": {"a": 1.0}, "tokens": 2**31}
    )
    file.scalars(301, {"loss": 1e300, "learning_rate": np.float64(0.25)})
    start, points = points_in(file.path)
    assert start == 300 and set(points) == {"train/loss", "eval/loss", "train/tokens", "train/learning_rate"}
    assert points["train/loss"] == [(2**40, float(np.float32(0.1))), (301, math.inf)]
    assert points["train/tokens"] == [(2**40, 2.0**31)] and points["train/learning_rate"] == [(301, 0.25)]
    assert math.isnan(points["eval/loss"][0][1])


def test_a_later_file_comes_later_by_name(tmp_path: Path) -> None:
    """TensorBoard reads files in the order of their names; the clock may have been set back."""
    (tmp_path / f"{PREFIX}9000000000.host.1.0").touch()
    (tmp_path / f"{PREFIX}odd").touch()
    made = [EventFile(tmp_path, 0).path for _ in range(3)]
    assert event_files(tmp_path)[1:4] == made


# --- runs

CONFIG = TrainingConfig(
    max_steps=6, tokens_per_batch=256, max_seq_length=32, eval_tokens=300, logging_steps=2, eval_steps=3, save_steps=3,
    whole_word_mask=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> Data:
    documents = read_documents(SHIPPED_TEXT)[:2]
    return prepare(documents, train_tokenizer(documents, 300), CONFIG)


@pytest.fixture(scope="module")
def resumed_run(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped after step 5 as by a crash, whose lines of steps 4 and 5 are done again from the state of step 3."""
    folder = tmp_path_factory.mktemp("run") / "out"

    def begin() -> Trainer:
        return Trainer(BertForMaskedLM(SMALL, "numpy"), data, CONFIG, folder, {"tensorboard": True})

    for kind, record in begin().run():
        if kind == "step" and record["step"] == 5:
            break
    again = begin()
    again.resume(read_state(folder))
    list(again.run())
    return folder


def test_a_resumed_run_opens_a_file_of_its_own(resumed_run: Path) -> None:
    first, second = event_files(resumed_run)
    start, before = points_in(first)
    assert start == 0 and [step for step, _ in before["train/loss"]] == [2, 4]
    start, after = points_in(second)
    assert start == 4, "the steps that are done again are void, that of the state is not"
    assert [step for step, _ in after["train/loss"]] == [4, 6]
    # What TensorBoard shows: the first file up to where the second begins, then the second.
    shown = {name: [p for p in before.get(name, []) if p[0] < 4] + after.get(name, []) for name in {*before, *after}}
    assert shown == logged(resumed_run)


@pytest.mark.parity
def test_tensorboard_reads_the_same(resumed_run: Path) -> None:
    """A torn record at the end of a file, too."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first, _ = event_files(resumed_run)
    with first.open("ab") as file:
        file.write(struct.pack("<Q", 40) + b"\x01\x02")
    read = accumulator.EventAccumulator(str(resumed_run), purge_orphaned_data=True)
    read.Reload()
    shown = {name: [(e.step, e.value) for e in read.Scalars(name)] for name in read.Tags()["scalars"]}
    assert shown == logged(resumed_run)


def test_command_masks_whole_words_and_writes_event_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["minibert", "pretrain", "--output", str(tmp_path / "run"), *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert stopped.value.code == 0, said.err
        return said.out

    text = tmp_path / "text.txt"
    text.write_text(SHIPPED_TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    sizes = ["--layers", 1, "--hidden", 64, "--vocab-size", 600, "--max-seq-length", 32, "--tokens-per-batch", 256]
    said = run(text, *sizes, "--steps", 1, "--whole-word-masking", "--tensorboard", "--backend", "numpy")
    assert f"tensorboard --logdir {tmp_path / 'run'}" in said
    state = read_state(tmp_path / "run")
    assert state.config.whole_word_mask and state.options["tensorboard"]
    assert points_in(event_files(tmp_path / "run")[0])[1] == logged(tmp_path / "run")
    run("--resume", "--steps", 2)
    assert points_in(event_files(tmp_path / "run")[1])[0] == 2
    run("--resume", "--steps", 3, "--no-tensorboard")
    assert len(event_files(tmp_path / "run")) == 2 and not read_state(tmp_path / "run").options["tensorboard"]


def test_a_trainer_masks_whole_words(data: Data, tmp_path: Path) -> None:
    """In training and on the held-out text."""
    trainer = Trainer(BertForMaskedLM(SMALL, "numpy"), data, CONFIG, tmp_path / "run")
    continues = continuing_pieces(data.tokenizer)
    longer = 0
    for batch in (*trainer.held_out, *(trainer.batches.batch(step) for step in range(20))):
        ids = np.where(batch.labels == -100, batch.input_ids, batch.labels)
        predicted, joined = batch.labels != -100, continues[ids] & (np.roll(ids, 1) > 4)
        np.testing.assert_array_equal(predicted[joined], np.roll(predicted, 1)[joined])
        longer += (predicted & joined).sum()
    assert longer > 20


def offline_records(path: Path) -> Iterator[bytes]:
    """Of a .wandb file: seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    content, place, parts = path.read_bytes(), 7, b""
    assert content.startswith(b":W&B")
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for a head: padding
            place += 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", content, place)
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.parity
def test_weights_and_biases_reads_the_same(data: Data, tmp_path: Path) -> None:
    """A run that was stopped and gone on with is one run, under one id."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason=f"needs wandb: {pip_install('[wandb]')}")
    folder, found = tmp_path / "out", []
    for stop in (4, 9):
        trainer = Trainer(BertForMaskedLM(SMALL, "numpy"), data, CONFIG, folder, {"wandb": "laws"})
        if found:
            trainer.resume(read_state(folder))
        for _ in trainer.run():
            trainer.stop = trainer.step == stop
        (run,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        found.append(run.stem)
    assert found[0] == found[1]
    points: dict[str, list[tuple[int, float]]] = {}
    config = {}
    for content in offline_records(run):
        record = messages.Record.FromString(content)
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for name in values.keys() - {"_step", "_timestamp", "_runtime"}:
            points.setdefault(name, []).append((values["_step"], float(np.float32(values[name]))))
        assert record.run.project in ("", "laws")
    assert points == logged(folder)
    assert config["learning_rate"] == CONFIG.learning_rate and config["whole_word_mask"] is True


def test_without_wandb_a_run_that_asks_for_it_does_not_begin(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="a run of Weights & Biases needs wandb: pip install "):
        Trainer(BertForMaskedLM(SMALL, "numpy"), data, CONFIG, tmp_path / "out", {"wandb": "laws"})
