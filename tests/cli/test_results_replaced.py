"""What the result of a command may replace: an earlier one of its kind, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minibert.cli.budget import BUDGET, markdown
from minibert.cli.options import machine, refuse_unwritable
from minibert.errors import UserError

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["diff", "numpy", "--record"], "model.safetensors"),
        (["diff", "numpy", "numba", "--json"], "vocab.txt"),
        (["bisect", "numpy", "numba", "--json"], "tokenizer.json"),
        (["compare", "--markdown"], "config.json"),
        (["compare", "--json"], "pytorch_model.bin"),
        (["kernels", "build", "--json"], "model.safetensors.index.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_no_result_replaces_part_of_a_model(refused: Refused, tmp_path: Path, command: list[str], file: str) -> None:
    (tmp_path / file).write_text("kept")
    assert f"{file} is part of a model, which is not replaced" in refused(*command, tmp_path / file)
    assert (tmp_path / file).read_text() == "kept"


RECORD, JSON, MARKDOWN = ["diff", "numpy", "--record"], ["compare", "--json"], ["compare", "--markdown"]


@pytest.mark.parametrize(
    ("command", "file", "content", "told"),
    [
        (RECORD, "training_log.jsonl", '{"step": 0}\n', "no trace"),
        (RECORD, "corpus.txt", "a corpus", "no trace"),
        (JSON, "corpus.txt", "a corpus", "no json"),
        (JSON, "trainer_state.json", '{"step": 0}', "no json"),
        (JSON, "list.json", '["machine"]', "no json"),
        (JSON, "latin.json", '{"machine": "é"}'.encode("latin-1"), "no json"),
        (["diff", "numpy", "numba", "--json"], "package.json", '{"name": "machine"}', "no json"),
        (["bisect", "numpy", "numba", "--json"], "deep.json", "[" * 100_000, "no json"),
        (["kernels", "build", "--update-budget", "--budget"], "budget.json", '{"rent": 1}', "no json"),
        (MARKDOWN, "notes.md", "# Notes on\n# minibert compare", "no markdown"),
        (["kernels", "build", "--markdown"], "README.md", "CUDA kernels", "no markdown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_no_result_replaces_a_file_that_is_none(
    refused: Refused, tmp_path: Path, command: list[str], file: str, content: str | bytes, told: str
) -> None:
    (path := tmp_path / file).write_bytes(content := content.encode() if isinstance(content, str) else content)
    assert f"{path} is {told} that minibert wrote, which is not replaced: name" in refused(*command, path)
    assert path.read_bytes() == content


def test_a_result_replaces_an_earlier_one(tmp_path: Path) -> None:
    contents = {
        "markdown": markdown([], ["sm_80"], "13.0"), "page": "<html>\n<title>minibert: 2 times</title>",
        "json": json.dumps({"bench": "step", "machine": machine()}), "csv": "any columns",
    }  # fmt: skip
    for kind, content in contents.items():
        (tmp_path / kind).write_text(content)
        refuse_unwritable(**{kind: tmp_path / kind})
        with pytest.raises(UserError, match="no trace that minibert wrote"):
            refuse_unwritable(trace=tmp_path / kind)
        (tmp_path / kind).write_text("")  # as mktemp leaves a file: nothing is lost
        refuse_unwritable(trace=tmp_path / kind)
    refuse_unwritable(json=BUDGET, markdown=Path("/dev/null"))
