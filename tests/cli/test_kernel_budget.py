"""The budget of the CUDA kernels, the page that shows it, and `minibert kernels build`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minibert.backends.cuda import nvrtc
from minibert.backends.cuda.nvrtc import Resources
from minibert.cli import budget, main
from minibert.errors import UserError
from minibert.kernels.gpu.launch import CudaFile

NEEDS_NVRTC = pytest.mark.skipif(nvrtc.available() is not None, reason=str(nvrtc.available()))

SCALE = """#include "gpu_common.cuh"
extern "C" __global__ void __launch_bounds__(128) scale(const Storage* __restrict__ x, Storage* __restrict__ y, int n) {
    __shared__ float unit[4];
    if (threadIdx.x < 4) unit[threadIdx.x] = load(x);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) store(y + i, load(x + i) * 3 + unit[i % 4]);
}
extern "C" __global__ void __launch_bounds__(32) count(int* __restrict__ total) { total[threadIdx.x] = WIDTH; }
"""
# 64 values that are all alive at once, in threads that may have 32 registers each
SPILLING = """extern "C" __global__ void __launch_bounds__(1024, 2) hoard(float* __restrict__ x, int n) {
    float a[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) a[i] = x[i * n + threadIdx.x];
#pragma unroll 1
    for (int k = 0; k < n; ++k) {
#pragma unroll
        for (int i = 0; i < 64; ++i) a[i] = a[i] * a[(i + 7) % 64] + a[(i * 3) % 64];
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = a[i];
}
"""
LAUNCHES = """from minibert.kernels.gpu.launch import CudaFile
count = CudaFile(__file__, "lone.cu").kernel("count", block=32)
"""
PLAIN = Resources(registers=40, shared_bytes=64, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0)
BUDGET = {"a/k": {"float32": {"sm_90": {"registers": 40, "shared_bytes": 64, "stack_bytes": 0}}}}


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is found that an earlier test, or the user, compiled; no toolkit of one test is that of another."""
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))
    yield
    nvrtc.toolkit.cache_clear()


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `minibert kernels build ...`: exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minibert", "kernels", "build", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, said.out, said.err

    return run


def use_family(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str, launched: dict[str, dict[str, Any]]) -> None:
    """Let `minibert kernels build` find one family, whose launch table is `launched`."""
    from minibert.cli import build

    folder.mkdir()
    (folder / "gpu.cu").write_text(source, encoding="utf-8")
    file = CudaFile(str(folder / "gpu.py"))
    for name, options in launched.items():
        file.kernel(name, **options)
    monkeypatch.setattr(build, "plan", lambda names=(): (build.units_of(folder.name, file), []))


# ------------------------------------------------------------------------------------------------------ without NVRTC


def test_without_nvrtc_the_command_says_what_to_install(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_places", lambda: iter(()))
    nvrtc.toolkit.cache_clear()
    assert nvrtc.available() == "CUDA kernels cannot be compiled: no NVRTC here; pip install 'minibert-lab[nvrtc]'"
    code, out, err = command()
    assert (code, out) == (2, "")
    assert err == f"error: {nvrtc.available()}\n"


def judge(rows: list[budget.Row], allowed: budget.Budget, complete: bool = True) -> list[str]:
    return budget.spills(rows) + budget.differences(rows, allowed, complete) + budget.excesses(rows, allowed)


def judged(used: Resources | None, arch: str = "sm_90", complete: bool = True) -> list[str]:
    """What the budget says of kernel a/k, or of there being no such kernel."""
    rows = [] if used is None else [budget.Row("a/k", "float32", 128, {arch: used})]
    return judge(rows, BUDGET, complete)


def test_within_the_budget_nothing_is_said() -> None:
    assert judged(PLAIN) == []
    assert judged(PLAIN._replace(registers=8, shared_bytes=0)) == []
    assert judged(PLAIN._replace(registers=99), arch="sm_80") == []  # no budget for it yet


@pytest.mark.parametrize(
    ("used", "says"),
    [
        (PLAIN._replace(registers=41), "a/k float32 on sm_90 takes 41 registers, over the budget of 40: keep fewer"),
        (PLAIN._replace(stack_bytes=8), "takes 8 bytes of stack, over the budget of 0: index arrays by constants"),
        (PLAIN._replace(shared_bytes=65), "takes 65 bytes of static shared memory, over the budget of 64: shrink"),
        (PLAIN._replace(spill_store_bytes=4, spill_load_bytes=8), "spills 12 bytes with 40 registers: keep fewer"),
    ],
)
def test_an_excess_is_one_line_that_says_what_to_do(used: Resources, says: str) -> None:
    (line,) = judged(used)
    assert says in line and "\n" not in line


def test_registers_come_by_eights() -> None:
    row = budget.Row("a/k", "float32", 128, {"sm_90": PLAIN._replace(registers=40)})
    for allowed, failures in ((32, 1), (33, 0)):
        figures = {"registers": allowed, "shared_bytes": 64, "stack_bytes": 0}
        assert len(judge([row], {"a/k": {"float32": {"sm_90": figures}}})) == failures


def test_a_kernel_and_the_budget_must_know_each_other() -> None:
    new = budget.Row("a/new", "float32", 128, {"sm_90": PLAIN})
    (line,) = judge([new], BUDGET, complete=False)
    assert line == f"a/new float32 on sm_90 is not in the budget: `{budget.REFRESH}` adds it"
    (line,) = judged(None)
    assert line == f"a/k float32 is in the budget but in no launch table: `{budget.REFRESH}` drops it"
    assert judged(None, complete=False) == []


def test_a_budget_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = [budget.Row(f"a/{name}", "any", 32, {"sm_80": PLAIN, "sm_90": PLAIN}) for name in "yx"]
    made = budget.updated(BUDGET, rows, complete=False)
    budget.write_budget(tmp_path / "b.json", made, "13.5")
    assert budget.read_budget(tmp_path / "b.json") == (made, "13.5")
    assert sorted(made) == ["a/x", "a/y"]  # a/k is of a family that was compiled, and is no more
    assert sorted(budget.updated({"b/k": BUDGET["a/k"]}, rows, complete=False)) == ["a/x", "a/y", "b/k"]
    assert sorted(budget.updated({"b/k": BUDGET["a/k"]}, rows, complete=True)) == ["a/x", "a/y"]
    assert judge(rows, made) == []
    one = budget.updated(made, [budget.Row("a/x", "any", 32, {"sm_90": PLAIN._replace(registers=9)})], complete=False)
    assert {arch: figures["registers"] for arch, figures in one["a/x"]["any"].items()} == {"sm_80": 40, "sm_90": 9}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"nvrtc": "13"}', '{"nvrtc": "13", "kernels": {"k": {"v": {"sm_90": 3}}}}']
)
def test_a_file_that_is_no_budget_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(UserError, match="is no budget of kernels: restore it"):
        budget.read_budget(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "warps"),
    [
        (32, 256, 0, "sm_90", 64),  # CUDA_Occupancy_Calculator's answers
        (33, 256, 0, "sm_90", 48),
        (168, 128, 0, "sm_90", 12),
        (255, 128, 0, "sm_80", 8),
        (255, 32, 0, "sm_80", 8),
        (16, 32, 0, "sm_80", 32),  # as many blocks as there may be
        (32, 64, 48 << 10, "sm_80", 6),
        (32, 1024, 0, "sm_86", 32),
        (32, 256, 0, "sm_75", None),
    ],
)
def test_resident_warps(registers: int, threads: int, shared: int, arch: str, warps: int | None) -> None:
    assert budget.resident_warps(Resources(registers, shared, 0, 0, 0), threads, arch) == warps


def rows_and_budget() -> tuple[list[Any], budget.Budget, str]:
    """Every kernel that is launched, and what is on file. Only NVRTC can add a kernel to it."""
    from minibert.cli import build

    units, failures = build.plan()
    assert failures == []
    rows = build.rows_of(units)
    allowed, version = budget.read_budget(budget.BUDGET)
    new = sorted({row.kernel for row in rows} - set(allowed))
    if new and nvrtc.available() is not None:
        pytest.skip(f"{', '.join(new)}: not in the budget yet. {nvrtc.available()}; then: {budget.REFRESH}")
    return rows, allowed, version


def test_every_kernel_is_in_a_launch_table_and_in_the_budget() -> None:
    rows, allowed, _ = rows_and_budget()
    assert rows
    assert {(row.kernel, row.variant) for row in rows} == {(k, v) for k in allowed for v in allowed[k]}, budget.REFRESH


def test_the_page_of_kernels_shows_what_the_budget_holds(root: Path) -> None:
    rows, allowed, version = rows_and_budget()
    for row in rows:
        for arch, figures in allowed[row.kernel][row.variant].items():
            row.resources[arch] = Resources(**figures, spill_store_bytes=0, spill_load_bytes=0)
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert page == budget.markdown(rows, ["sm_80", "sm_90"], version), f"refresh it: {budget.REFRESH}"


def test_what_no_launch_table_asks_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minibert.cli import build

    folder = tmp_path / "kernels"
    folder.mkdir()
    sources = {"lone.cu": SCALE, "left_over.cu": SCALE, "gpu_lone.py": LAUNCHES, "gpu_broken.py": "1 / 0"}
    for name, source in sources.items():
        (folder / name).write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(nvrtc, "KERNELS", folder)
    monkeypatch.setattr(build, "launching_modules", lambda: {"lone": "gpu_lone", "broken": "gpu_broken"})
    units, failures = build.plan()
    assert [(unit.family, unit.label, list(unit.rows)) for unit in units] == [("lone", "float32", ["count"])]
    assert failures == [
        "kernel scale of kernels/lone.cu is never launched: give it a line in gpu_lone",
        "gpu_broken cannot be imported: ZeroDivisionError: division by zero",
        "kernels/left_over.cu is in no launch table",
    ]


def test_a_family_without_kernels_is_refused() -> None:
    from minibert.cli import build

    with pytest.raises(UserError, match=r"no family with CUDA kernels is called 'softmacks': choose from .*softmax"):
        build.plan(["softmacks"])


# --------------------------------------------------------------------------------------------------------- with NVRTC


@NEEDS_NVRTC
def test_a_spill_fails_the_build(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_family(monkeypatch, tmp_path / "greedy", SPILLING, {"hoard": {"block": 1024}})
    for update in ([], ["--update-budget"]):  # no budget makes a spill right
        code, out, _ = command("--arch", "sm_90", "--budget", tmp_path / "b.json", *update)
        (line,) = [line for line in out.splitlines() if line.startswith("FAIL greedy/hoard")]
        assert code == 1 and "any on sm_90 spills" in line and "with 32 registers: keep fewer values" in line


@NEEDS_NVRTC
def test_a_spill_in_a_called_function_fails_the_build(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SPILLING.replace('extern "C" __global__ void __launch_bounds__(1024, 2)', "__device__ __noinline__ void")
    source += 'extern "C" __global__ void __launch_bounds__(1024, 2) k(float* x, int n) { hoard(x, n); }\n'
    use_family(monkeypatch, tmp_path / "greedy", source, {"k": {"block": 1024}})
    code, out, _ = command("--arch", "sm_90", "--budget", tmp_path / "b.json")
    (line,) = [line for line in out.splitlines() if line.startswith("FAIL greedy float32 on sm_90: function ")]
    assert code == 1 and "hoard" in line and "make it __forceinline__" in line


@NEEDS_NVRTC
def test_the_budget_is_written_held_and_exceeded(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = {"scale": {"block": 128, "variants": [{"WIDTH": 3}, {"WIDTH": 4}]}, "count": {"block": 32}}
    launched["count"]["variants"] = [{"WIDTH": 3}]
    use_family(monkeypatch, tmp_path / "scale", SCALE, launched)
    path, shown, page = tmp_path / "b.json", tmp_path / "f.json", tmp_path / "page.md"
    common = ("--arch", "sm_80,sm_90,compute_90", "--budget", path)
    code, out, err = command(*common)
    assert code == 0 and "has no budget for sm_80, sm_90: only spills are judged" in err

    code, out, _ = command(
        *common, "--update-budget", "--output", tmp_path / "code", "--json", shown, "--markdown", page
    )
    assert code == 0 and "PASS 6 compilations for each of sm_80, sm_90, compute_90" in out
    assert ": 7 kernels in their variants, none spills, none is over its budget" in out
    kept, version = budget.read_budget(path)
    assert {(k, v) for k in kept for v in kept[k]} == {
        *(("scale/scale", f"{t} WIDTH={w}") for t in ("float32", "float16", "bfloat16") for w in (3, 4)),
        ("scale/count", "any WIDTH=3"),
    }
    assert {path.name for path in (tmp_path / "code").iterdir()} == {
        f"scale.gpu.{t}.WIDTH={w}.{end}"
        for t in ("float32", "float16", "bfloat16") for w in (3, 4)
        for end in ("sm_80.cubin", "sm_90.cubin", "compute_90.ptx")
    }  # fmt: skip
    read = json.loads(shown.read_text())
    assert len(read["kernels"]) == 14 and read["failures"] == []
    assert page.read_text().count("| scale/scale |") == 6

    assert command(*common)[0] == 0
    kept["scale/scale"]["float16 WIDTH=4"]["sm_90"]["registers"] = 8
    budget.write_budget(path, kept, version)
    code, out, _ = command(*common)
    failures = [line for line in out.splitlines() if line.startswith("FAIL ")]
    assert code == 1 and len(failures) == 2 and "over the budget of 8" in failures[0]
    assert failures[0].startswith("FAIL scale/scale float16 WIDTH=4 on sm_90 takes ")
    budget.write_budget(path, kept, "11.0")
    code, out, err = command(*common)
    assert code == 0 and "none spills\n" in out
    assert command("scale", *common, "--update-budget")[::2] == (
        2, f"error: the budget was written with NVRTC 11.0, this is {version}: update it for all families\n"
    )  # fmt: skip
    assert f"written with NVRTC 11.0, and only that is held to it; with {version} 1 figures exceed it" in err


@NEEDS_NVRTC
def test_an_error_in_a_file_fails_the_build_once(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_family(monkeypatch, tmp_path / "scale", SCALE.replace("load(x);", "lode(x);"), {"scale": {"block": 128}})
    code, out, _ = command("--budget", tmp_path / "b.json")
    assert code == 1
    assert [line for line in out.splitlines() if "lode" in line] == [
        f'FAIL {tmp_path / "scale" / "gpu.cu"}:4: identifier "lode" is undefined'
    ]


@NEEDS_NVRTC
def test_a_kernel_that_a_variant_hides_fails_the_build(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "#ifdef SHOWN\n" + 'extern "C" __global__ void k(int* x) { *x = 1; }\n' + "#endif\n"
    use_family(monkeypatch, tmp_path / "shy", hidden, {"k": {"block": 32, "variants": [{"SHOWN": 1}, {}]}})
    code, out, _ = command("--arch", "sm_90", "--budget", tmp_path / "b.json")
    assert code == 1 and "FAIL shy/k any on sm_90 compiles to nothing" in out


@NEEDS_NVRTC
def test_a_family_of_the_repository_compiles_within_its_budget(command: Command) -> None:
    code, out, _ = command("softmax", "--arch", "sm_90")
    assert code == 0, out
    assert "none spills" in out
