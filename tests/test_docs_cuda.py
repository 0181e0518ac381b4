"""docs/emulator.md and docs/cuda.md are true: files and commands give what they show; and what --kernel refuses.

A page is walked from top to bottom: files and diffs are kept, and each console block runs on the files of that moment.
Compared are messages, verdicts and rows of tables; not how often a finding was seen, nor the digits of an error, which
depend on the compiler and the C library.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer

from minibert import backends
from minibert.backends.base import BackendUnavailable
from minibert.backends.emulator import toolchain
from minibert.backends.emulator.process import EmulatorCrash
from minibert.cli import app, main, register_commands
from minibert.errors import UserError
from minibert.lab.conform.own_kernels import load_kernels, refuse_misshapen
from tests.backends.test_emulator import FAULTS, Device, provoke
from tests.test_docs import blocks

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = "try"  # in which the walk's author stood: messages name it
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHARES = 5  # percent
FILE_NAME = re.compile(r"`(\w+\.(?:cu|py))`:\s*$")


def emulator_missing() -> str:
    try:
        toolchain.compiler()
    except BackendUnavailable as error:
        return str(error)
    return ""


needs_emulator = pytest.mark.skipif(bool(emulator_missing()), reason=emulator_missing())


class Step(NamedTuple):
    """A command of the page, what the page shows of its output, and the files as they were."""

    command: str
    shown: str
    files: dict[str, str]


def walk(page: Path) -> Iterator[Step]:
    text = page.read_text(encoding="utf-8")
    files: dict[str, str] = {}
    for block in BLOCK.finditer(text):
        named = FILE_NAME.search(text[: block.start()])
        if block[1] in ("cuda", "python") and named:
            files[named[1]] = block[2]
        elif block[1] == "diff":
            file, files = patched(block[2], files)
            assert file in files
        elif block[1] == "console":
            command, _, shown = block[2].partition("\n")
            yield Step(command.removeprefix("$ minibert "), shown, {**files, "tiles.py": tiles(files)})


def patched(diff: str, files: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The files with a diff applied, which must fit in one place."""
    head, _, body = diff.partition("@@\n")
    file = head.split()[1]
    lines = body.splitlines()
    before, after = ("\n".join(line[1:] for line in lines if line[:1] in marks) for marks in ("- ", "+ "))
    assert files[file].count(before) == 1, f"the diff does not fit: {diff}"
    return file, {**files, file: files[file].replace(before, after)}


def tiles(files: dict[str, str]) -> str:
    """As the page says: by_threads.py with another name."""
    return files.get("by_threads.py", "").replace("by_threads", "tiles")


STEPS = list(walk(DOCS / "emulator.md"))


def run(folder: Path, step: Step, answers: str = "") -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    for name, content in step.files.items():
        (folder / name).write_text(content, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    environment.pop("COLUMNS", None)
    command = [sys.executable, "-m", "minibert", *step.command.split()]
    return subprocess.run(
        command, cwd=folder, env=environment, input=answers, capture_output=True, text=True, timeout=600
    )


def key_lines(output: str) -> list[str]:
    """Messages, verdicts and rows of tables, without what may differ from machine to machine."""
    found = []
    for line in output.splitlines():
        words = re.sub(rf"\S*/(?={FOLDER}/)", "", line).split()
        text = re.sub(r"seen \d+ times?", "seen", " ".join(words))
        text = re.sub(r"\d+ inputs", "inputs", text)  # as many as there was time for
        if re.match(rf"{FOLDER}/\w+\.cu:\d+ (?:global|shared) ", text):
            found.append(" ".join([*words[:3], re.search(r"\d+(?:%| ways)$", text)[0]]))  # type: ignore[index]
        elif words[1:2] == ["emulator"]:
            found.append(" ".join([*words[:5], words[-1]]))
        elif text.startswith(("PASS ", "FAIL ", "error: ")) or f"{FOLDER}/" in text or text.startswith("again by"):
            found.append(text)
    return found


def alike(shown: str, printed: str) -> bool:
    """The same line; shares of memory traffic are apart by what there was time for."""
    (line, share), (other, found) = (re.fullmatch(r"(.*?)(\d*)%?", text).groups() for text in (shown, printed))  # type: ignore[union-attr]
    if not (shown.endswith("%") and printed.endswith("%")):
        return shown == printed
    return line == other and abs(int(share) - int(found)) <= SHARES


def test_the_walk_has_its_stations() -> None:
    verdicts = [re.search(r"^(PASS|FAIL|error)", step.shown, re.M) for step in STEPS]
    assert [v and v[1] for v in verdicts] == ["FAIL", "PASS", "FAIL", *["PASS"] * 6, "error"]
    assert "race in shared memory" in STEPS[0].shown and "--no-sanitize" in STEPS[1].command


@needs_emulator
@pytest.mark.parametrize("number", [i for i, step in enumerate(STEPS) if "--gdb" not in step.command])
def test_a_command_prints_what_the_page_shows(number: int, tmp_path: Path) -> None:
    step = STEPS[number]
    done = run(tmp_path / FOLDER, step)
    expected, printed = key_lines(step.shown), key_lines(done.stdout + done.stderr)
    assert expected
    missing = [line for line in expected if not any(alike(line, other) for other in printed)]
    assert not missing, f"{step.command}\nnot printed: {missing}\nprinted: {printed}"
    status = {"PASS": 0, "FAIL": 1, "error": 2}
    assert done.returncode == next(status[word] for word in status if expected[-1].startswith(word))


@needs_emulator
@pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt install gdb")
def test_gdb_answers_as_the_page_shows(tmp_path: Path) -> None:
    (step,) = (step for step in STEPS if "--gdb" in step.command)
    asked = re.findall(r"^\(gdb\) (.*)$", step.shown, re.M)
    done = run(tmp_path / FOLDER, step, "".join(f"{line}\n" for line in asked))
    if "ptrace: Operation not permitted" in done.stdout + done.stderr:
        pytest.skip("gdb may not trace processes here")
    answers = re.compile(r"^(?:\(gdb\) )*(\$\d+ = .*|\d+\t.*|PASS .*)$", re.M)
    expected = answers.findall(step.shown)
    assert len(expected) == 7  # two lines of source, four values, the verdict
    assert answers.findall(done.stdout) == expected, done.stdout + done.stderr


@needs_emulator
def test_the_examples_of_findings_are_real() -> None:
    page = DOCS / "emulator.md"
    shown = next(block for block in blocks(page, "text") if block.startswith("race")).splitlines()
    device, made = Device(timeout=0.5), []
    for kernel, *_, grid, block in FAULTS:
        made += provoke(device, kernel, grid, block)
    freed = device.array(np.ones(64, "f4"))
    device.process.region(freed, 256, "freed")
    made += device.run("faults.cu", "read_without_barrier", 1, 64, freed, device.empty(256), np.int32(64)).findings
    messages = {re.sub(r" \[kernel [^]]*\]$", "", str(finding)) for finding in made}
    zeros = device.array(np.zeros(64, "f4"))
    for kernel, block in (("writes_to_null", 64), ("never_ends", 1)):
        with pytest.raises(EmulatorCrash) as caught:
            device.run("crashes.cu", kernel, 1, block, zeros, np.int32(0), sanitize=False)
        messages.add(re.sub(r" \[kernel [^]]*\].*$", "", str(caught.value)))
    device.process.close()
    places = re.compile(r"emulator_kernels/\w+\.cu:\d+")
    messages = {places.sub("FILE:LINE", message).removeprefix("FILE:LINE: ") for message in messages}
    assert not [line for line in shown if line not in messages]
    kinds = set(re.findall(r"^\| ([a-z ]+?) +\|", page.read_text(), re.M))
    assert {finding.kind for finding in made} <= kinds, "a kind of finding is not explained"


@needs_emulator
def test_memory_runs_out_as_the_page_shows(tmp_path: Path) -> None:
    source = next(b for b in blocks(DOCS / "cuda.md", "python") if "MINIBERT_EMULATOR_MEMORY=0.01" in b)
    message = next(b for b in blocks(DOCS / "cuda.md", "text") if "DeviceMemoryExhausted" in b)
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent), "MINIBERT_EMULATOR_MEMORY": "0.01"}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.stderr.splitlines()[-1] == message.strip()


@pytest.mark.parametrize("document", ["emulator.md", "cuda.md"])
def test_what_the_pages_name_exists(root: Path, document: str) -> None:
    text = (DOCS / document).read_text(encoding="utf-8")
    named = set(re.findall(r"\b((?:kernels|backends|minibert|tests|bench)/[\w./*-]+\.(?:py|cuh?|md|json))\b", text))
    named |= {f"docs/{link}" for link in re.findall(r"\]\(([\w./]+\.md)\)", text)}
    assert not [name for name in named if "silu" not in name and not list(root.glob(name))]
    targets = re.findall(r"^make ([\w-]+)$", text, re.M)
    assert not [name for name in targets if not re.search(rf"^{name}:", (root / "Makefile").read_text(), re.M)]


@pytest.mark.parametrize("document", ["emulator.md", "cuda.md"])
def test_commands_and_options_that_the_pages_name_exist(document: str) -> None:
    register_commands()

    text = (DOCS / document).read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"(?:^|`|^\$ |^ {4})minibert ((?:kernels )?[a-z]+)([^`\n]*)", text, re.MULTILINE)
    assert used
    for name, rest in used:
        command = commands
        for word in name.split():
            assert word in command, f"there is no command minibert {name}"
            found = command[word]
            command = getattr(found, "commands", {})
        options = {option for parameter in found.params for option in parameter.opts + parameter.secondary_opts}
        assert set(re.findall(r" (--[a-z-]+)", rest)) - {"--help"} <= options, f"minibert {name}{rest}"


# What else --kernel may be given

RIGHT = STEPS[3].files  # my_softmax with its barrier


def tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, tuple[str, str]], spec: str, place: str
) -> int | str | None:
    """The exit status of `minibert check softmax` with a kernel, after a change to a file of the walk."""
    for name, content in RIGHT.items():
        before, after = changes.get(name, ("", ""))
        assert before in content
        (folder / name).write_text(content.replace(before, after, 1), encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["minibert", "check", "softmax", "--backend", place, "--kernel", spec])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


PYTHON, CUDA = "my_softmax.py", "my_softmax.cu"
MINE = "my_softmax.py:softmax=softmax"


@needs_emulator
@pytest.mark.parametrize(
    ("changes", "spec", "place", "told"),
    [
        ({}, MINE, "numpy", "its file has CUDA kernels, which take arrays of --backend emulator or cupy"),
        ({}, "my_softmax.cu:softmax=softmax", "emulator", "my_softmax.cu is CUDA C: name the .py file"),
        ({}, "my_softmax.py:my_softmax=softmax", "emulator", "name the function that launches it; there is softmax"),
        ({}, "my_softmax.py:softmx=softmax", "emulator", "no function 'softmx'; it has softmax"),
        ({PYTHON: ('"my_softmax"', '"softmax"')}, MINE, "emulator", "no kernel 'softmax'; it has my_softmax"),
        ({PYTHON: ("return y", "pass")}, MINE, "emulator", "got NoneType"),
        ({PYTHON: ("return y", "return x.device.numpy(y)")}, MINE, "emulator", "got ndarray"),
        ({CUDA: ("float total = 0;", "")}, MINE, "emulator", "my_softmax.cu:29:"),
        ({CUDA: ("int rows", "dim3 rows")}, MINE, "emulator", "of a type that a launch cannot check"),
    ],
)
def test_a_kernel_that_cannot_be_tried_is_one_line(
    changes: dict[str, tuple[str, str]], spec: str, place: str, told: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert tried(tmp_path, monkeypatch, changes, spec, place) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and told in line


@needs_emulator
def test_a_cpu_function_is_told_that_it_got_device_arrays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cpu.py").write_text("import numpy as np\n\ndef softmax(x):\n    return np.exp(x)\n")
    assert tried(tmp_path, monkeypatch, {}, "cpu.py:softmax=softmax", "emulator") == 2
    assert "on this backend a function launches CUDA kernels" in capsys.readouterr().err


@needs_emulator
def test_a_wrong_call_fails_every_check_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {PYTHON: ("(x, y, rows, columns,", "(x, y, rows,")}
    assert tried(tmp_path, monkeypatch, changes, MINE, "emulator") == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL softmax")]
    assert len(failures) == 1
    assert "fails follows_formula, part_in_step, " in failures[0]
    assert "kernel my_softmax takes 4 arguments (x, y, rows, columns), got 3, at " in failures[0]
    assert re.search(r"my_softmax\.py:\d+: in softmax \(arrays of shapes \(3, 7\)\)", failures[0])


@needs_emulator
def test_the_shapes_of_a_tried_kernel_are_looked_at_on_its_device(tmp_path: Path) -> None:
    for name, content in RIGHT.items():
        (tmp_path / name).write_text(content.replace("return y", "return y.reshape(-1)"), encoding="utf-8")
    kernels = load_kernels([f"{tmp_path}/{MINE}"])
    with pytest.raises(UserError, match=r"expected results of shapes \[\(3, 7\)\], got \[\(21,\)\]"):
        refuse_misshapen(kernels, backends.get("emulator"))
    with pytest.raises(UserError, match="its file has CUDA kernels"):
        refuse_misshapen(kernels)
    (tmp_path / CUDA).write_text(STEPS[0].files[CUDA])
    (tmp_path / PYTHON).write_text(RIGHT[PYTHON])
    racy = load_kernels([f"{tmp_path}/{MINE}"])
    with pytest.raises(UserError, match=r"my_softmax\.cu:25: race in shared memory"):
        refuse_misshapen(racy, backends.get("emulator"))
