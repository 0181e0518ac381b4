"""Kernels that reach beyond their arrays, do not end or carry state from call to call, tried in another process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from minibert import backends
from minibert.backends import Backend
from minibert.kernels import OPS
from minibert.lab.conform import guarded
from minibert.lab.conform.case import Case
from minibert.lab.conform.check import check, run_check
from minibert.lab.conform.guarded import not_tried, refuse_harm, trial
from minibert.lab.conform.own_kernels import load_kernels

KERNELS = Path(__file__).with_name("reaching_kernels.py")
relu = OPS["relu"]


@contextmanager
def trying(kernel: str, backend: str) -> Iterator[Backend]:
    """A backend on which relu is run by that kernel."""
    with backends.get(backend).using(load_kernels([f"{KERNELS}:{kernel}=relu"])) as place:
        yield place


def line_of(fragment: str) -> str:
    """`reaching_kernels.py:12: the line`, as a message has it."""
    found = [(n, text.strip()) for n, text in enumerate(KERNELS.read_text().splitlines(), 1) if fragment in text]
    assert len(found) == 1
    return "reaching_kernels.py:{}: {}".format(*found[0])


X = r"x \(21 elements of float32, shape \(3, 7\)\)"
PAST = "1 element past the end of"
MADE = r"an array of 84 bytes that the kernel made, as large as a result of shape \(3, 7\)"


@pytest.mark.parametrize(
    ("kernel", "said", "line"),
    [
        ("reads_past", f"reads {PAST} {X}: index 7 of axis 1, which has 7, at ", "max(largest, abs("),
        ("writes_past_in_threads", f"writes {PAST} {MADE}: index 3 of axis 0, which has 3, at ", "y[i + 1, j]"),
        ("reads_far", rf"reads 980 elements past the end of {X}", ""),
        ("reads_before", f"reads 1 element before the start of {X}", ""),
        ("writes_past_its_own", f"writes {PAST} {MADE}", ""),
        ("returns_freed", f"reads {MADE}, which had been freed", ""),
        ("does_not_end", r"did not end in 1 s, at .*reaching_kernels.py:\d+: in kernel", ""),
        ("exits", "ended the process with exit status 3", ""),
        ("aborts", r"ended the process by SIGABRT: .*, at .*reaching_kernels.py:\d+: in aborts", ""),
    ],
)  # fmt: skip
def test_what_would_harm_this_process_is_told_and_not_run_in_it(
    kernel: str, said: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarded, "CALL_SECONDS", 1.0)
    if not line:  # which takes another process
        monkeypatch.setattr(guarded, "index_beyond", lambda job: "")
    with trying(kernel, "numba") as place:
        (only,) = check([relu], [place], ["float32"])
    assert not only.ok and only.check == "guarded"
    where = r"relu on numba in float32 fails guarded \(seed 0\): sample 0 \(shapes \(3, 7\); params {}\): "
    assert re.match(where + said, only.message), only.message
    assert not line or line_of(line) in only.message
    assert "nothing else was tried" in only.message


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        ("wrong_from_call_7", r"sample 0 .*: call 7 on the same input gave other bits than call 1: y\[0, 0\] is "),
        ("leaves_unwritten", r"sample 0 .*: the result depends on memory that nothing wrote: .* y\[2, 6\] is "),
        ("raises", r"--kernel .*:raises=relu raised SystemExit: no, at .*: in raises"),
    ],
)
def test_what_is_wrong_and_does_no_harm_is_told(kernel: str, said: str) -> None:
    with trying(kernel, "numpy") as place:
        result = run_check("guarded", relu, place, "float32")
        refuse_harm("deterministic", Case(relu, place, "float32", 0))  # does not
    assert re.match(r"relu on numpy in float32 fails guarded \(seed 0\): " + said, result.message), result.message


def test_a_right_kernel_is_called_on_every_input_and_a_thousand_times_on_one() -> None:
    with trying("right", "numba") as place:
        verdict = trial(Case(relu, place, "float32", 0))
    assert not verdict.problem and verdict.inputs > 100 and verdict.calls > 100


@pytest.mark.parametrize("op", ["softmax", "attention_grad", "linear_gelu", "adamw", "dropout"])
def test_our_kernels_stay_within_their_arrays(op: str) -> None:
    verdict = trial(Case(OPS[op], backends.get("numba"), "float32", 0))
    assert not verdict.problem and verdict.inputs > 3 and verdict.calls > 1


def test_a_kernel_that_another_process_cannot_find_is_not_tried_and_the_reason_is_told() -> None:
    numpy = backends.get("numpy")
    with numpy.using({relu: lambda x: x}):
        assert "another cannot find it by a name" in not_tried(Case(relu, numpy, "float32", 0))
        refuse_harm("deterministic", Case(relu, numpy, "float32", 0))
    assert "a formula runs the op" in not_tried(Case(relu, numpy, "float32", 0))
