"""The conformance plugin: on an outside backend and outside kernels, what it finds, what it says, and its fixtures."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.errors import UserError
from minibert.kernels import OPS, Op
from minibert.kernels.softmax import softmax, softmax_grad
from minibert.lab.conform.gradcheck import assert_within_bound, gradcheck
from minibert.lab.conform.suite import CHECKS, footer, read_suite
from minibert.model.tensor import Tensor, apply
from tests.test_wheel import installed, run, wheel  # noqa: F401  the fixtures that build a wheel

PLUGIN = ("-p", "minibert.conformance")
BROKEN = """
def softmax(x):
    y = OPS["softmax"].formula(numpy_module, x)
    return (y * y.dtype.type(1.001)).astype(y.dtype)

def raises(x, y):
    return x.no_such_method(y)

from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
"""


@pytest.fixture
def examples(root: Path, tmp_path: Path) -> Path:
    """A copy of tests/examples, far from the repository."""
    return Path(shutil.copytree(root / "tests" / "examples", tmp_path / "elsewhere"))


@pytest.fixture
def plugin(root: Path, examples: Path) -> Callable[..., Any]:
    """Runs pytest with the plugin in a folder that knows nothing of this repository's settings."""

    def start(*words: str) -> Any:
        environment = {**os.environ, "PYTHONPATH": str(root), "MINIBERT_NUM_THREADS": "1", "COLUMNS": "200"}
        environment.pop("PYTEST_ADDOPTS", None)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words]
        return subprocess.run(command, cwd=examples, env=environment, capture_output=True, text=True, timeout=600)

    return start


def test_an_outside_backend_and_kernel_with_the_wheel_installed(
    installed: Path,  # noqa: F811
    examples: Path,
) -> None:
    here = f"import minibert\ndef test_wheel(): assert minibert.__file__.startswith({str(installed)!r})\n"
    (examples / "test_where.py").write_text(here, encoding="utf-8")
    words = ("-m", "pytest", *PLUGIN)
    suite = run(*words, "--backend", "shelf_backend.py:ShelfBackend", cwd=examples, path=(installed,))
    demanded = sum(len(line.split()) for line in suite.splitlines() if line.startswith("softmax "))
    assert "test_where.py ." in suite and re.search(r"(\d+) of \1 checks passed, 0 failed", suite), suite
    assert demanded == 1 + len(CHECKS)
    kernel = ("--kernel", "row_softmax.py:softmax=softmax", "--backend", "numpy")
    suite = run(*words, *kernel, cwd=examples, path=(installed,))
    assert re.search(r"(\d\d) of \1 checks passed, 0 failed", suite), suite
    assert "conformance of a kernel on numpy" in suite and "kernel under test: row_softmax.py:softmax" in suite


def test_a_module_names_a_backend_as_a_file_does(plugin: Callable[..., Any]) -> None:
    ran = plugin(*PLUGIN, "--backend", "shelf_backend:ShelfBackend", "--ops", "softmax")
    assert ran.returncode == 0 and "conformance of shelf_backend:ShelfBackend 0.1: arrays on a shelf" in ran.stdout


@pytest.mark.parametrize(
    "line",
    re.findall(r"^\$ pytest (.*)$", (Path(__file__).parents[2] / "examples" / "README.md").read_text(), re.MULTILINE),
)
def test_every_line_of_the_examples_passes(line: str, plugin: Callable[..., Any]) -> None:
    if "emulator" in line and shutil.which("g++") is None:
        pytest.skip("the emulator needs g++: apt install g++")
    ran = plugin(*shlex.split(line))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"=+ .*\b[1-9]\d* passed", ran.stdout)


def test_a_broken_kernel_is_shown_and_shown_again(plugin: Callable[..., Any], examples: Path) -> None:
    (examples / "broken.py").write_text(BROKEN, encoding="utf-8")
    ran = plugin(*PLUGIN, "--kernel", "broken.py:softmax=softmax", "--conformance-seed", "7", "-x")
    assert ran.returncode == 1
    failure = dict(re.findall(r"^(\w+) {2,}(.*)$", ran.stdout, re.MULTILINE))
    assert failure["op"] == "softmax, run by a kernel on numba"
    assert failure["check"].startswith("follows_formula: Every element of every output")
    assert (failure["dtype"], failure["seed"], failure["sample"]) == ("float32", "7", "0")
    assert failure["shapes"] == "(3, 7)" and failure["params"] == "{}"
    assert re.fullmatch(r"y\[\d, \d\]", failure["worst"])
    got, off = float(failure["got"].split(",")[0]), float(re.findall(r"off by (\S+),", failure["got"])[0])
    assert got / float(failure["expected"]) == pytest.approx(1.001, rel=1e-5)
    assert off == pytest.approx(got - float(failure["expected"]), rel=1e-2)
    words = shlex.split(failure["again"])
    assert words[0] == "pytest" and words[-1] == "conformance::softmax-follows_formula-float32"
    again = plugin(*words[1:])
    assert again.returncode == 1 and "collected 1 item" in again.stdout and "0 of 1 checks passed" in again.stdout
    assert re.findall("^got .*", again.stdout, re.MULTILINE) == re.findall("^got .*", ran.stdout, re.MULTILINE)


def test_a_kernel_that_raises_is_shown_with_its_line(plugin: Callable[..., Any], examples: Path) -> None:
    (examples / "broken.py").write_text(BROKEN, encoding="utf-8")
    ran = plugin(*PLUGIN, "--kernel", "broken.py:raises=add", "conformance::add-deterministic-float32")
    assert ran.returncode == 1
    failure = dict(re.findall(r"^(\w+) {2,}(.*)$", ran.stdout, re.MULTILINE))
    assert failure["at"] == "broken.py:7: in raises: return x.no_such_method(y)"
    assert "AttributeError" in failure["raised"] and failure["sample"] == "0"
    assert failure["shapes"].count("(") == 2


def test_a_kernel_that_would_end_pytest_is_run_in_no_check(plugin: Callable[..., Any], examples: Path) -> None:
    (examples / "broken.py").write_text("import os\ndef add(x, y): os.abort()\n")
    checks = [f"conformance::add-{check}-float32" for check in ("guarded", "deterministic")]
    ran = plugin(*PLUGIN, "--kernel", "broken.py:add=add", *checks)
    assert ran.returncode == 1 and "0 of 2 checks passed, 2 failed" in ran.stdout
    found = set(re.findall("^found .*", ran.stdout, re.MULTILINE))  # pytest's summary repeats them where CI is set
    assert len(found) == 2 and all(
        "ended the process by SIGABRT" in line and "broken.py:2: in add" in line for line in found
    )


def test_a_kernel_that_takes_no_empty_arrays_is_found(plugin: Callable[..., Any], examples: Path) -> None:
    (examples / "broken.py").write_text("def add(x, y): return x.reshape(len(x), -1).reshape(x.shape) + y\n")
    ran = plugin(*PLUGIN, "--kernel", "broken.py:add=add", "conformance::add-empty_inputs-float32")
    assert ran.returncode == 1
    failure = dict(re.findall(r"^(\w+) {2,}(.*)$", ran.stdout, re.MULTILINE))
    assert failure["sample"] == "0" and "(0, " in failure["shapes"]
    assert "cannot reshape array of size 0" in failure["raised"]


def test_header_and_footer(plugin: Callable[..., Any]) -> None:
    ran = plugin(*PLUGIN, "--backend", "shelf_backend.py:ShelfBackend", "--ops", "softmax,adamw,gelu")
    text = ran.stdout
    assert ran.returncode == 0
    versions = rf"NumPy {re.escape(np.__version__)}; threads 1\nminibert \S+, Python 3\.\d+\.\d+"
    assert re.search(rf"conformance of shelf_backend.py:ShelfBackend 0.1: arrays on a shelf, {versions}", text)
    assert "31 checks of 3 ops in float32, float64; seed 0" in text and "collected 31 items" in text
    # guarded formula part values propagates strided inputs empty determ. fresh order calls size gradient rounding
    rows = (
        "softmax 1 2 1 1 1 1 1 1 1 1 1 - 1 1 1",
        "adamw - 2 1 - - 1 1 - 1 1 - - - - -",
        "all ops 1 6 3 1 1 3 3 1 3 3 1 - 1 2 2",
    )
    for row in rows:
        assert re.search(f"^{re.sub(' ', ' +', row)}$", text, re.MULTILINE)
    assert "31 of 31 checks passed, 0 failed" in text
    assert "not run: gradient, gradient_rounding of adamw: the op has no gradient" in text
    assert "not run: guarded of adamw, gelu: no kernel that could reach beyond its arrays: a formula runs" in text
    assert "not run: order_of_work of adamw, gelu: no kernel whose work could be divided: a formula runs the op" in text
    assert "of all ops: float64 was not asked for (--dtypes float64)" in text
    assert "not run: anything in float16, bfloat16: shelf has no such arrays" in text


def test_expected_failures_that_pass_are_stale(plugin: Callable[..., Any], examples: Path) -> None:
    listed = (examples / "tanh_gelu.txt").read_text(encoding="utf-8")
    listed = listed.replace("gelu-strided_inputs-float32", "conformance::gelu-deterministic-float32")
    (examples / "stale.txt").write_text(listed + "gelu-gradient-float32\n", encoding="utf-8")
    ran = plugin(*PLUGIN, "--kernel", "tanh_gelu.py:gelu=gelu", "--expected-failures", "stale.txt")
    assert ran.returncode == 1
    said = "8 of 15 checks passed, 1 failed, 6 failed as expected, 1 passed that should fail: the list is stale"
    assert said in ran.stdout and "expected failures: 8 in stale.txt" in ran.stdout
    assert "stale: gelu-deterministic-float32 passed, though stale.txt:5 expects it to fail" in ran.stdout
    assert "gelu-gradient-float32, which stale.txt:9 expects to fail, is no check of this run" in ran.stdout
    assert "FAILED conformance::gelu-strided_inputs-float32" in ran.stdout  # no longer listed


def test_exit_codes_of_usage_and_of_nothing_to_do(plugin: Callable[..., Any], examples: Path) -> None:
    wrong = plugin(*PLUGIN, "--backend", "numpi")
    assert wrong.returncode == pytest.ExitCode.USAGE_ERROR
    assert wrong.stderr.strip().splitlines() == [
        f"ERROR: no backend is called 'numpi': choose one of {', '.join(backends.names())}, "
        "or name your own as FILE.py:NAME"
    ]
    assert plugin(*PLUGIN).returncode == pytest.ExitCode.NO_TESTS_COLLECTED  # nothing is under test
    unmarked = plugin(*PLUGIN, "--backend", "numpy", "--strict-markers", "-m", "not conformance")
    assert unmarked.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "was chosen" in unmarked.stdout


def test_workers_of_xdist_run_what_was_asked_for(plugin: Callable[..., Any]) -> None:
    pytest.importorskip("xdist")
    ran = plugin(*PLUGIN, "--backend", "numpy", "-n", "2", "conformance::add-deterministic-float32")
    assert ran.returncode == 0 and "1 of 1 checks passed" in ran.stdout


def options(**given: Any) -> Any:
    """pytest's options, as the plugin declares them."""
    usual = {"backend": "numpy", "kernels": [], "ops": "softmax", "dtypes": None, "seed": "0", "expected": None}
    return SimpleNamespace(**{f"conformance_{name}": value for name, value in {**usual, **given}.items()})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backend": "nowhere.py:backend"}, "nowhere.py cannot be imported: FileNotFoundError"),
        ({"backend": "no_such_package:backend"}, "ModuleNotFoundError: No module named 'no_such_package'"),
        ({"backend": "shelf_backend.py:Shelf"}, "has no 'Shelf'; it defines ShelfArray, softmax, softmax_grad, Shelf"),
        ({"backend": "shelf_backend.py:softmax"}, "softmax() raised TypeError"),
        ({"backend": "shelf_backend.py:__version__"}, "expected a minibert.backends.Backend, got str"),
        ({"ops": "softmx"}, "did you mean 'softmax'?"),
        ({"ops": ","}, "--ops: expected names with commas between them"),
        ({"dtypes": "int8"}, "backend numpy has arrays of float32, float64, float16, bfloat16: not 'int8'"),
        ({"dtypes": "float32,float32"}, "--dtypes: expected names with commas between them, each once"),
        ({"seed": "-1"}, "--conformance-seed: expected a whole number from 0, got '-1'"),
        ({"kernels": ["none.py:f=add"]}, "--kernel: there is no file none.py"),
        ({"kernels": ["{folder}/row_softmax.py:softmax=add"]}, "--kernel replaces add, but only softmax is checked"),
        ({"expected": "none.txt"}, "--expected-failures: none.txt cannot be read"),
        ({"expected": "{folder}/bad.txt"}, "bad.txt:2: expected an id such as softmax-follows_formula-float32"),
        ({"selected": ["conformance::softmx-gradient-float64"]}, "no op is called 'softmx'"),
        ({"selected": ["conformance::softmax_grad-gradient-float64"]}, "is not run on numpy"),
    ],
)
def test_wrong_options_are_told(
    given: dict[str, Any], said: str, examples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(examples)
    (examples / "bad.txt").write_text("# a comment\nsoftmax-follows_formula\n", encoding="utf-8")
    for name, value in given.items():
        words = [word.format(folder=examples) for word in ([value] if isinstance(value, str) else value)]
        given = {**given, name: words[0] if isinstance(value, str) else words}
    with pytest.raises(UserError) as told:
        read_suite(options(**given))
    assert said in str(told.value) and "\n" not in str(told.value)


def test_a_backend_that_would_not_run_the_kernel_is_refused(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(examples)
    source = (examples / "shelf_backend.py").read_text(encoding="utf-8")
    deaf = source.replace("self._kernels.get(op) or KERNELS.get(op.name)", "KERNELS.get(op.name)")
    assert deaf != source
    (examples / "deaf.py").write_text(deaf, encoding="utf-8")
    kernel = f"{examples}/row_softmax.py:softmax=softmax"
    read_suite(options(backend="shelf_backend.py:ShelfBackend", kernels=[kernel]))
    with pytest.raises(UserError, match=r"deaf.py:ShelfBackend does not run kernels given by using\(\)"):
        read_suite(options(backend="deaf.py:ShelfBackend", kernels=[kernel]))


def test_the_footer_counts_what_was_not_reached() -> None:
    suite = read_suite(options())
    ids = [str(demand) for demand in suite.demands]
    told = footer(suite, {ids[0]: "passed", ids[1]: "failed"})
    assert "1 of 2 checks passed, 1 failed" in told
    assert f"not run: {len(ids) - 2} checks that were not chosen, or not reached" in told


# ------------------------------------------------------------------------------------------------------- the fixtures


@pytest.fixture
def numpy() -> Any:
    return backends.get("numpy")


@pytest.fixture
def wrong_op() -> Iterator[Op]:
    """x^2, whose gradient forgets the 2."""
    square = Op(
        "wrong_square", lambda xp, x: x * x, samples=lambda rng: iter(()), bench=softmax.bench,
        vjp=lambda run, g, outs, x: (g * x,),
    )  # fmt: skip
    yield square
    del OPS["wrong_square"]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return apply(softmax, q @ k.transpose(1, 0) * 0.5) @ v


X = np.random.default_rng(0).standard_normal((3, 3, 4))


def test_gradcheck_finds_a_wrong_gradient(numpy: Any, wrong_op: Op) -> None:
    gradcheck(softmax, X[0], backend=numpy)
    gradcheck("linear", X[0], X[1], X[2, :, 0], backend=numpy)
    with pytest.raises(AssertionError, match=r"on numpy: .*gradient of x: <J v, w> = "):
        gradcheck(wrong_op, X[0], backend=numpy)
    with pytest.raises(AssertionError, match=r"on numpy: gradient of input 1, shape \(3, 4\): <J v, w> = "):
        gradcheck(lambda a, b: a + apply(wrong_op, b), X[0], X[1], backend=numpy)


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-9])
def test_gradcheck_of_a_function_sees_a_kernel_that_is_off_by_a_billionth(numpy: Any, scale: float) -> None:
    kernel = {softmax_grad: lambda g, y: softmax_grad.formula(numpy.xp, g, y) * scale}
    with numpy.using(kernel):
        if scale == 1:
            gradcheck(attend, *X, backend=numpy)
        else:
            with pytest.raises(AssertionError, match="gradient of input 0"):
                gradcheck(attend, *X, backend=numpy)


def test_gradcheck_of_a_function_knows_inputs_that_do_not_matter(numpy: Any) -> None:
    gradcheck(lambda a, b: a * a, X[0], X[1], backend=numpy)
    gradcheck(lambda a, ids: apply(OPS["gather_rows"], a, ids), X[0], np.array([2, 0, 2]), backend=numpy)


def test_gradcheck_without_float64(numpy: Any) -> None:
    if shutil.which("g++") is None:
        pytest.skip("the emulator needs g++: apt install g++")
    emulator = backends.get("emulator")
    gradcheck(softmax, X[0], backend=emulator)
    with pytest.raises(UserError, match="needs float64, which emulator lacks"):
        gradcheck(attend, *X, backend=emulator)


def test_gradcheck_refuses_what_it_cannot_check(numpy: Any) -> None:
    with pytest.raises(UserError, match="op 'softmax_grad' has no gradient"):
        gradcheck("softmax_grad", X[0], X[1], backend=numpy)
    with pytest.raises(UserError, match="expected a function that returns a Tensor, got ndarray"):
        gradcheck(lambda a: a.numpy(), X[0], backend=numpy)  # type: ignore[arg-type,return-value]


def test_assert_within_bound(numpy: Any) -> None:
    x = X[0].astype(np.float32)
    y = numpy.run(softmax, x)
    assert_within_bound("softmax", [x], {}, y)
    assert_within_bound(softmax, [X[0]], {}, y)  # rounded to what the backend saw
    with pytest.raises(AssertionError, match=r"softmax in float32 \(shapes \(3, 4\)\): y\[\d, \d\]: expected"):
        assert_within_bound("softmax", [x], {}, y * np.float32(1.00001))
    with pytest.raises(AssertionError, match="expected shape"):
        assert_within_bound("softmax", [x], {}, y[:2])
    with pytest.raises(AssertionError, match="expected dtype float64, got float32"):
        assert_within_bound("softmax", [x], {}, y, dtype="float64")
