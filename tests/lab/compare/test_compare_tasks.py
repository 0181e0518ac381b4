"""`minibert compare`, `diff` and `bisect` of a step of fine-tuning: op by op as of any other, the fault where it is."""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import minibert as mb
from minibert.cli import main
from minibert.data import SHIPPED_VOCABULARY
from minibert.lab.measure.peaks import Peaks
from minibert.model.heads import BertForSequenceClassification

pytestmark = pytest.mark.usefixtures("smaller_tiny")
TASKS = ("classify", "regress", "tag", "answer", "embed")
SMALL = ("--tokens", "150", "--max-seq-length", "48")
# Ops that a step of masked language modelling does not have, or has not in such numbers, and the loss.
OPS = {
    "classify": {"tanh", "tanh_grad", "gather_rows", "cross_entropy"},
    "regress": {"tanh", "tanh_grad", "gather_rows", "mse_loss"},
    "tag": {"dropout", "cross_entropy"},
    "answer": {"slice_axis", "cross_entropy"},
    "embed": {"mean_pool", "mean_pool_grad", "normalize_grad", "cross_entropy"},
}
ROWS = [("good", "a good film"), ("bad", "a long and dull film"), ("good", "well played, well sung"), ("bad", "no")]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Exit status, standard output and standard error of a command, in this process."""
    peaks = Peaks(gflops=40.0, product="m", fma_gflops=50.0, triad_gbps=8.0, fill_gbps=10.0, cache_bytes=1 << 20)
    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", lambda dtype: peaks)  # it takes seconds
    monkeypatch.setattr("minibert.lab.measure.peaks.launch_seconds", lambda backend: 1e-6)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minibert", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A table with columns that cannot be guessed."""
    path = tmp_path / "reviews.csv"
    path.write_text("what,how\n" + "".join(f'"{text}",{label}\n' for label, text in ROWS * 3))
    return path


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[str], str]:
    """A kernel of one op whose first output is too large by a hundredth, as --kernel takes it."""

    def make(op: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(
            "import numpy as np\nfrom minibert.kernels import OPS\n"
            "from minibert.kernels.array_module import numpy_module\n\n"
            "def off(*arrays, **params):\n"
            f"    made = OPS[{op!r}].formula(numpy_module, *arrays, **params)\n"
            "    first, *rest = made if isinstance(made, tuple) else (made,)\n"
            "    off = np.asarray(first * 1.01, arrays[0].dtype)\n"
            "    return (off, *(np.asarray(x, arrays[0].dtype) for x in rest)) if rest else off\n"
        )
        return f"{path}:off={op}"

    return make


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_step_of_an_electras_two_halves_is_compared_too(run: Run, tmp_path: Path) -> None:
    code, out, err = run(
        "compare", "--task", "rtd", *SMALL, "--steps", 2, "--backends", "numpy,numba", "--json", tmp_path / "found.json"
    )
    assert code == 0 and "PASS" in out, err
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"gumbel", "binary_cross_entropy", "linear_cross_entropy"} <= {row["op"] for row in found["ops"]}


@pytest.mark.parametrize("task", TASKS)
def test_every_op_of_the_step_is_judged_on_every_backend(task: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    status, out, err = run("compare", "--backends", "numpy,numba", "--task", task, *SMALL, "--steps", 2, "--json", file)
    assert status == 0, (out, err)
    lines = out.splitlines()
    assert lines[0].startswith(f"tiny: {task}, L2 C32") and lines[1].startswith(f"{task}: labels made from the text: ")
    facts = read(file)
    config = facts["config"]
    assert config["task"] == task and config["examples"] == lines[1].removeprefix(f"{task}: ")
    assert f"{config['predicted']} predicted" in lines[0] and config["predicted"] > 0
    if task in ("classify", "regress"):
        assert config["predicted"] == config["sequences"] > 1
    if task == "embed":
        assert 2 * config["predicted"] == config["sequences"] > 2
    for backend in ("numpy", "numba"):
        rows = {row["op"]: row for row in facts["ops"] if row["backend"] == backend}
        assert set(rows) >= OPS[task] | {"attention", "attention_grad", "adamw"}
        assert all(row["ok"] and row["bound_share"] < 1 and row["judged"] for row in rows.values())
        assert {row["stage"] for row in facts["stages"]} >= {"forward", "backward", "inference"}
    assert facts["loss"]["numpy"] == pytest.approx(facts["loss"]["numba"], rel=1e-5)
    assert all(op in out for op in OPS[task])


@pytest.mark.parametrize("task", TASKS)
def test_two_sides_part_nowhere(task: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    status, out, err = run("diff", "numpy", "numba", "--task", task, *SMALL, "--json", file)
    assert status == 0, (out, err)
    assert out.startswith("no culprit: ") and f"tiny, {task}, float32, seed 0: " in out
    facts = read(file)
    assert facts["settings"]["task"] == task and facts["unjudged"] == 0
    assert {row["op"] for row in facts["calls"]} >= OPS[task]
    judged = [row[side] for row in facts["calls"] for side in ("a", "b", "local")]
    assert all(one["bound_share"] < 1 and not one["unbounded"] for one in judged)


@pytest.mark.parametrize(("task", "op"), [("classify", "cross_entropy"), ("regress", "mse_loss"), ("tag", "dropout")])
def test_a_wrong_kernel_is_the_culprit(task: str, op: str, run: Run, kernel: Callable[[str], str]) -> None:
    """The loss's own op too, and one that the head alone calls first."""
    status, out, err = run("diff", "numpy", "numba", "--task", task, *SMALL, "--kernel", kernel(op))
    assert status == 1, (out, err)
    assert out.startswith(f"CULPRIT {op} ") and "side B (numba) is wrong" in out.partition("\n")[0]


def test_compare_and_bisect_name_the_loss_too(run: Run, kernel: Callable[[str], str], tmp_path: Path) -> None:
    spec = kernel("mse_loss")
    status, out, _ = run(
        "compare", "--backends", "numpy,numba", "--task", "regress", *SMALL, "--steps", 2, "--kernel", spec
    )
    assert status == 1 and "mse_loss" in out.splitlines()[-1] + out.splitlines()[-2]
    status, out, _ = run(
        "bisect", "numpy", "numba", "--task", "regress", *SMALL, "--steps", 2, "--kernel", spec,
        "--output", tmp_path, "--json", tmp_path / "facts.json",
    )  # fmt: skip
    assert status == 1 and out.startswith("step 1 of 2 (judged: 1): CULPRIT mse_loss (forward, call ")
    assert "regress: labels made from the text: " in out
    facts = read(tmp_path / "facts.json")
    assert facts["task"] == "regress" and len(facts["written"]) == 2


def test_a_run_of_several_steps(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "facts.json"
    status, out, err = run("diff", "numpy", "numba", "--task", "tag", *SMALL, "--steps", 2, "--json", file)
    assert status == 0, (out, err)
    assert out.startswith("no culprit in 2 steps: ") and "tag: labels made from the text" in out
    assert read(file)["task"] == "tag"


def test_the_page_says_which_task(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minibert.cli.compare._crossovers", lambda *_: None)
    folder = tmp_path / "page"
    arguments = ("--backends", "numpy,numba", "--task", "answer", *SMALL, "--steps", 2, "--report", folder)
    status, out, err = run("compare", *arguments)
    assert status == 0, (out, err)
    facts = read(folder / "facts.json")
    assert facts["config"]["task"] == "answer"
    page = html.unescape((folder / "index.html").read_text())
    assert facts["config"]["summary"] in page and facts["config"]["examples"] in page


def test_labelled_examples_of_a_file(run: Run, reviews: Path, tmp_path: Path) -> None:
    columns = ("--text-column", "what", "--label-column", "how")
    file = tmp_path / "facts.json"
    status, out, err = run(
        "diff", "numpy", "numba", "--task", "classify", "--train", reviews, *columns, *SMALL, "--json", file
    )
    assert status == 0, (out, err)
    assert f"classify: examples of {reviews}, text: column 'what', label: column 'how'" in out
    config = read(file)["settings"]["config"]
    assert config["id2label"] == {"0": "bad", "1": "good"} and config["problem_type"] == "single_label_classification"

    several = tmp_path / "several.jsonl"
    several.write_text("".join(json.dumps({"text": text, "labels": [label, "film"]}) + "\n" for label, text in ROWS))
    status, out, err = run("diff", "numpy", "numba", "--task", "classify", "--train", several, *SMALL, "--all")
    assert status == 0 and "binary_cross_entropy" in out and "text: column 'text'" in out, err


def test_a_fine_tuned_folder_keeps_its_head_and_its_labels(run: Run, tmp_path: Path) -> None:
    config = mb.BertConfig(
        vocab_size=8000, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=48, id2label={0: "no", 1: "perhaps", 2: "yes"},
    )  # fmt: skip
    model = BertForSequenceClassification(config, "numpy", seed=9)
    bias = model.classifier.bias
    bias.data[:] = [100, 0, 0]  # no head that was drawn again would be so sure
    model.save_pretrained(tmp_path, [SHIPPED_VOCABULARY])
    file = tmp_path / "facts.json"
    small = ("--tokens", "150", "--max-seq-length", "48", "--json", file)
    status, out, err = run("diff", "numpy", "numba", "--config", tmp_path, "--task", "classify", *small)
    assert status == 0, (out, err)
    assert "counted round the model's 3 labels" in out
    facts = read(file)
    assert list(facts["settings"]["config"]["id2label"].values()) == ["no", "perhaps", "yes"]
    assert facts["loss"]["a"] > 20
    status, out, err = run("diff", "numpy", "numba", "--config", tmp_path, "--task", "tag", *small)
    assert status == 0 and read(file)["loss"]["a"] < 3, (out, err)  # a new head for another task


def test_a_trace_is_of_its_task(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    assert run("diff", "numba", "--task", "regress", *SMALL, "--record", trace)[0] == 0
    status, out, _ = run("diff", trace, "numpy", "--task", "regress", *SMALL)
    assert status == 0 and out.startswith("no culprit: ")
    status, _, err = run("diff", trace, "numpy", *SMALL)
    assert status == 2 and "was recorded with --task regress, here it is mlm" in err


@pytest.mark.parametrize("task", ["embed", "mlm"])
def test_an_encoder_of_sentences_may_lie_in_a_folder_of_its_own(task: str, run: Run, tmp_path: Path) -> None:
    """As sentence-transformers wrote it before its release 3."""
    config = mb.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    mb.BertForMaskedLM(config, "numpy").save_pretrained(tmp_path / "0_Transformer")
    kinds = {"0_Transformer": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds.items())
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    status, out, err = run("compare", "--task", task, "--config", tmp_path, "--backends", "numpy", *SMALL)
    assert status == 0 and "PASS" in out, err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "clasify"], "--task: expected mlm, rtd, classify, regress, tag, answer, embed, got 'clasify'"),
        (["--train", "x.csv"], "--train: labelled examples are for --task classify, regress, tag, answer"),
        (["--task", "tag", "--train", "x.conll", "--text", "y.txt"], "--text: the examples are those of --train"),
        (["--task", "tag", "--token-column", "2"], "--token-column: expected --train FILE with it"),
        (["--task", "classify", "--label-separator", ","], "--label-separator: expected --train FILE with it"),
        (["--task", "classify", "--train", "nowhere.csv"], "nowhere.csv"),
        (["--task", "classify", "--train", "{reviews}"], "--text-column"),
        (["--task", "answer", "--max-seq-length", "8"], "expected a max_seq_length above doc_stride"),
    ],
)
@pytest.mark.parametrize("command", [["compare"], ["diff", "numpy", "numba"]], ids=["compare", "diff"])
def test_a_mistake_is_one_line(command: list[str], arguments: list[str], said: str, run: Run, reviews: Path) -> None:
    status, _, err = run(*command, *(a.replace("{reviews}", str(reviews)) for a in arguments))
    assert status == 2 and said in err
    assert err.startswith("error: ") and len(err.splitlines()) == 1
