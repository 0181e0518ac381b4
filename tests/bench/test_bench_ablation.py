"""`bench.ablation`: what is said to be taken away is away, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import ablation
from bench.timing import harness
from minibert.errors import UserError
from minibert.kernels.cpu.vectors import VECTOR_BYTES
from minibert.model.config import NAMED

pytestmark = pytest.mark.usefixtures("smaller_tiny")


@pytest.fixture(scope="module")
def step(smaller_tiny: None) -> ablation.Step:
    return ablation.Step(NAMED["tiny"], 3, 24, 0)


def test_a_family_without_its_kernels_runs_by_formula(step: ablation.Step) -> None:
    families = step.families()
    assert {"attention", "layer_norm", "adamw", "linear"} <= families.keys()
    backend, seen = step.side.backend, {}

    def note(op, arrays, params, call):  # type: ignore[no-untyped-def]
        seen[op] = backend.by(op)
        return call()

    with backend.watched_by(note):
        step.without(families["attention"])()
    assert {seen[op] for op in families["attention"]} == {"formula"}
    assert {seen[op] for op in families["layer_norm"]} == {"kernel"}


def test_padding_and_predicting_all_keep_the_tokens(step: ablation.Step) -> None:
    padded, everything = step.padded(), step.predicting_all()
    assert len(set(padded.lengths)) == 1 and padded.predicted == step.batch.predicted
    ids, real = padded.padded["input_ids"], step.batch.real
    assert np.array_equal(ids[real], step.batch.packed.input_ids)
    assert everything.predicted == len(step.batch.packed.input_ids) and list(everything.lengths) == list(
        step.batch.lengths
    )


def test_the_command_writes_a_row_for_each(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setting = "more than one thread"
    monkeypatch.setattr(ablation, "SETTINGS", {setting: ablation.SETTINGS[setting], "nothing": ({"HELD": "1"}, "")})
    monkeypatch.delenv("MINIBERT_NUM_THREADS", raising=False)
    monkeypatch.setenv("HELD", "1")
    words = ["--config", "tiny", "--batch", "2", "--length", "16", "--rounds", "3", "--json", str(tmp_path / "a.json")]
    monkeypatch.setattr(sys, "argv", ["bench.ablation", *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(ablation.bench)
    assert exit_.value.code == 0
    document = json.loads((tmp_path / "a.json").read_text())
    names = [row["without"] for row in document["rows"]]
    assert (
        names[0] == ablation.AS_IT_IS
        and names[-1] == f"{setting} (a process of its own)"
        and "the head on predicted rows alone" in names
    )
    assert all(row["ms"] > 0 and row["p20"] <= row["p80"] for row in document["rows"])
    out = capsys.readouterr().out
    assert setting in out and "nothing: the environment has taken that away already" in out


@pytest.mark.skipif(VECTOR_BYTES != 64, reason="the vectors here have fewer than 512 bits")
def test_a_process_without_vectors_of_512_bits_has_those_of_256(root: Path) -> None:
    environment, call = ablation.SETTINGS["vectors of 512 bits"]
    code = "from minibert.kernels.cpu.vectors import VECTOR_BYTES; print(VECTOR_BYTES)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env={**os.environ, **environment},
        timeout=600,
    )  # fmt: skip
    assert done.stdout == "32\n" and not call, done.stderr


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(UserError, match="more than one thread: KeyError"):
        ablation.in_a_process("more than one thread", {"config": NAMED["tiny"].to_dict(), "batch": 1, "length": 8})
