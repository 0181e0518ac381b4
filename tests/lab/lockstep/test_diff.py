"""A one-line fault planted in a kernel is named by op, side and place, and `bisect` tests for it; none is invented.

A fault is text of a kernel's source that is replaced. Where an edit of the kernel removes what a fault replaces, the
fault is to be planted elsewhere.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import minibert as mb
from minibert.cli.diff_report import facts, verdict
from minibert.kernels import OPS
from minibert.lab.lockstep.bisect import Bisection, bisect
from minibert.lab.lockstep.diff import diff
from minibert.lab.lockstep.reproduce import Case, smallest
from minibert.lab.lockstep.trace import Recording, Side, record
from tests.planted import KERNELS_AT_HAND, emulator, planted, replaced, source
from tests.small_steps import DEEP, NUMBA, NUMPY, OTHER, SMALL, TINY, WIDE, assert_clean, batch, maker, tiny_batch

PLACES = {
    "embeddings": "bert.embeddings",
    "first norm": "bert.encoder.layer.0.attention.output",
    "first attention": "bert.encoder.layer.0.attention.self",
    "last attention": "bert.encoder.layer.1.attention.self",
    "last norm": "bert.encoder.layer.1.output",
    "head": "cls.predictions",
    "transform": "cls.predictions.transform",
    "optimiser": "",
}


def reference_loss(step: int) -> float:
    loss = _reference(step).loss
    assert loss is not None
    return loss


@cache
def _reference(step: int) -> Recording:
    return record(Side(NUMPY), maker(), batch(), step)


class Fault(NamedTuple):
    """A mistake in a Numba kernel: where the first call that it makes wrong stands."""

    what: str
    family: str
    op: str
    place: str
    phase: str
    old: str
    new: str
    step: int = 1

    def __str__(self) -> str:
        return self.what.replace(" ", "-")

    def kernel(self) -> Callable[..., Any]:
        text = replaced(source(f"{self.family}/cpu.py"), self.old, self.new)
        module = types.ModuleType(f"planted_{self.family}")  # no file, so that Numba keeps no code of it
        exec(compile(text, f"<planted {self.family}/cpu.py>", "exec"), module.__dict__)
        found: Callable[..., Any] = getattr(module, self.op)
        return found


FAULTS = (
    # ------------------------------------------------------------------------------------------------------- forward
    Fault(
        "every token is of the first type", "embedding", "embedding", "embeddings", "forward",
        "token_type[types[n]]", "token_type[0]",
    ),
    Fault(
        "every block draws the words of the first", "dropout", "dropout", "embeddings", "forward",
        "philox_row(words, first, x_block.size, *stream)", "philox_row(words, 0, x_block.size, *stream)",
    ),
    Fault(
        "variance over n - 1", "layer_norm", "add_layer_norm", "first norm", "forward",
        "math.sqrt(squares / n + eps)", "math.sqrt(squares / (n - x.dtype.type(1)) + eps)",
    ),
    Fault(
        "variance about zero", "layer_norm", "add_layer_norm", "first norm", "forward",
        "squares += (x[j] - mean) * (x[j] - mean)", "squares += x[j] * x[j]",
    ),
    Fault(
        "statistics of the first row kept for all", "layer_norm", "add_layer_norm", "first norm", "forward",
        "mean[i], rstd[i] = normalise(z_row, weight, bias, eps, y[i])",
        "mean[i], rstd[i] = normalise(z_row, weight, bias, eps, y[i])[0], rstd[start] if i > start else 1.0",
    ),
    Fault(
        "dropout scaled by what it should divide by", "layer_norm", "add_layer_norm", "first norm", "forward",
        "dtype.type(1 / (1 - rate))", "dtype.type(1 - rate)",
    ),
    Fault(
        "the last key of a sequence is lost", "attention", "attention", "first attention", "forward",
        "v_panels, sums, deep, rows, size, t, False)", "v_panels, sums, deep, rows, size, max(1, t - 1), False)",
    ),
    Fault(
        "no scale of dropout on attention", "attention", "attention", "first attention", "forward",
        "share, row, sums_row = kept / totals[r],", "share, row, sums_row = 1 / totals[r],",
    ),
    Fault(
        "dropout spares the last query", "attention", "attention", "first attention", "forward",
        "drop_scores(scores, words, rows * wide, drop)", "drop_scores(scores, words, (rows - 1) * wide, drop)",
    ),
    Fault(
        "gelu a little too large", "linear", "linear_gelu", "transform", "forward",
        "    return y, before\n", "    return y * y.dtype.type(1.0001 if len(x) < 40 else 1), before\n",
    ),
    # ------------------------------------------------------------------------------------------------------ backward
    Fault(
        "gradient of a mean over one row more", "cross_entropy", "linear_cross_entropy", "head", "forward",
        "rows = type(top)(count)", "rows = type(top)(count + 1)",
    ),
    Fault(
        "no mean in the gradient of layer norm", "layer_norm", "layer_norm_grad", "transform.LayerNorm", "backward",
        "g[j] * weight[j] - mean_h - n * mean_hn", "g[j] * weight[j] - n * mean_hn",
    ),
    Fault(
        "dropout forgotten in a gradient", "layer_norm", "add_layer_norm_grad", "last norm", "backward",
        "dz_row[j] * scale if words[j] >= limit else zero", "dz_row[j] * scale",
    ),
    Fault(
        "gelu's gradient without its density", "activation", "gelu_grad", "transform", "backward",
        "v * density * exp(-half * v * v)", "v * density * exp(-v * v)",
    ),
    Fault(
        "missing scale of scores", "attention", "attention_grad", "last attention", "backward",
        "(slope * kept - delta) * scale", "(slope * kept - delta)",
    ),
    Fault(
        "dropped scores have a gradient", "attention", "attention_grad", "last attention", "backward",
        "ds_row[j] if keep else zero, kept", "ds_row[j], kept",
    ),
    Fault(
        "the gradient of a bias lacks the last row", "linear", "linear_grad", "head", "backward",
        "reduce_sum(g, axis=0)", "reduce_sum(g[:-1], axis=0)",
    ),
    Fault(
        "the last of equal rows is not added", "embedding", "scatter_rows", "embeddings", "backward",
        "for k in range(starts[i], ends[i]):", "for k in range(starts[i], ends[i] - 1):",
    ),
    # ----------------------------------------------------------------------------------------------------- optimiser
    Fault(
        "the first block alone is summed", "adamw", "square_norm", "optimiser", "optimiser",
        "np.asarray(partial.sum(), np.float32", "np.asarray(partial[0], np.float32",
    ),
    Fault(
        "clipping by the square of the norm", "adamw", "clip_scale", "optimiser", "optimiser",
        "norm = math.sqrt(square_norm[i]) + 1e-6", "norm = square_norm[i] + 1e-6",
    ),
    Fault(
        "epsilon inside the square root", "adamw", "adamw", "optimiser", "optimiser",
        "(math.sqrt(second) / root + eps)", "(math.sqrt(second + eps) / root)",
    ),
    Fault(
        "no bias correction of the mean", "adamw", "adamw", "optimiser", "optimiser",
        "lr / (1 - beta1**step)", "lr",
    ),
    Fault(
        "no bias correction of the variance", "adamw", "adamw", "optimiser", "optimiser",
        "(1 - beta2**step) ** 0.5", "1.0",
    ),
    Fault(
        "weights do not decay", "adamw", "adamw", "optimiser", "optimiser",
        "p[i] = p[i] * decay - first", "p[i] = p[i] - first",
    ),
    Fault(
        "the second moment never fades", "adamw", "adamw", "optimiser", "optimiser",
        "second = v[i] * beta2 + gradient", "second = v[i] + gradient", step=2,
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_fault_in_a_numba_kernel_is_named(fault: Fault, tmp_path: Path) -> None:
    side = Side(NUMBA, kernels={OPS[fault.op]: fault.kernel()})
    found = diff(Side(NUMPY), side, maker(), batch(), fault.step)
    row = found.culprit
    assert row is not None, "the fault was not noticed"
    assert (row.op, row.phase, row.side) == (fault.op, fault.phase, "B"), verdict(found)
    assert row.place == PLACES.get(fault.place, f"cls.predictions.{fault.place}")
    said = verdict(found)
    assert fault.op in said and f"call {row.call}" in said and "side B (numba) is wrong" in said
    share = facts(found)["culprit"]["bound_share"]
    assert share is None or share > 1  # None: infinitely often a bound of 0
    assert found.losses[1] == pytest.approx(reference_loss(fault.step), rel=0.05), "so the loss gives it away"

    run = bisect(Side(NUMPY), side, maker(), lambda number: batch(), fault.step)
    assert run.first == fault.step and run.found.culprit is not None
    assert (run.found.culprit.op, run.found.culprit.place) == (row.op, row.place)
    test = written(run, side, tmp_path, [f"{tmp_path / 'mine.py'}:{fault.op}={fault.op}"])
    (tmp_path / "mine.py").write_text(f"from tests.planted import KERNELS_AT_HAND\n\n{fault.op} = KERNELS_AT_HAND[0]\n")
    for kernel, ok in ((side.kernels[OPS[fault.op]], False), (NUMBA._find(OPS[fault.op]), True)):
        KERNELS_AT_HAND[:] = [kernel]
        assert passes(test) == ok, "the test does not tell the fault from the sound kernel"


def written(run: Bisection, side: Side, folder: Path, specs: Sequence[str] = ()) -> Path:
    """The test of what was found on B."""
    evidence = run.found.evidence
    assert evidence is not None and evidence.on == "B"
    found = smallest(evidence, side)
    assert found is not None
    assert sum(x.size for x in found.inputs) <= sum(x.size for x in evidence.inputs)
    test, data = Case(found, side, specs, "said").write(folder / "case")
    assert data.is_file()
    return test


def passes(test: Path) -> bool:
    """Run the one test of a file that `bisect` wrote."""
    module: dict[str, Any] = {"__file__": str(test)}
    exec(compile(test.read_text(), str(test), "exec"), module)
    (function,) = [f for name, f in module.items() if name.startswith("test_")]
    try:
        function()
    except AssertionError as error:
        assert str(error), "without a word of what is wrong"
        return False
    return True


class CudaFault(NamedTuple):
    """A mistake in a CUDA kernel."""

    what: str
    file: str
    op: str
    phase: str
    place: str
    old: str
    new: str

    def __str__(self) -> str:
        return self.what.replace(" ", "-")


CUDA_FAULTS = (
    CudaFault(
        "epsilon inside the square root", "adamw/gpu.cu", "adamw", "optimiser", "",
        "(sqrtf(exp_avg_sq) * n.root + n.eps)", "(sqrtf(exp_avg_sq + n.eps) * n.root)",
    ),
    CudaFault(
        "variance over n - 1", "layer_norm/gpu.cu", "layer_norm", "forward", "bert.embeddings.LayerNorm",
        "sqrtf(warp_sum(squares) / columns + eps)", "sqrtf(warp_sum(squares) / (columns - 1) + eps)",
    ),
    CudaFault(
        "no mean in the gradient of layer norm", "layer_norm/gpu.cu", "layer_norm_grad", "backward",
        "cls.predictions.transform.LayerNorm",
        "(g[i] * weight[i] - mean_h - n * mean_hn) * rstd", "(g[i] * weight[i] - n * mean_hn) * rstd",
    ),
    CudaFault(
        "no scale of dropout on attention", "attention/gpu_flash.cuh", "attention", "forward",
        "bert.encoder.layer.0.attention.self", "factor[i] = call.kept / sum;", "factor[i] = 1.0f / sum;",
    ),
    CudaFault(
        "gradient of a mean over one row more", "cross_entropy/gpu.cu", "linear_cross_entropy", "forward",
        "cls.predictions", "const float hit = 1.0f / count;", "const float hit = 1.0f / (count + 1);",
    ),
)  # fmt: skip


@pytest.mark.parametrize("fault", CUDA_FAULTS, ids=str)
def test_a_fault_in_a_cuda_kernel_is_named(fault: CudaFault, tmp_path: Path) -> None:
    side = Side(emulator())
    with planted(fault.file, replaced(source(fault.file), fault.old, fault.new)):
        run = bisect(Side(NUMBA), side, maker(TINY), lambda number: tiny_batch(), 1)
        test = written(run, side, tmp_path)
        assert not passes(test)
    assert passes(test)
    found = run.found
    row = found.culprit
    assert row is not None, "the fault was not noticed"
    assert (row.op, row.phase, row.place, row.side) == (fault.op, fault.phase, fault.place, "B"), verdict(found)
    assert "side B (emulator) is wrong" in verdict(found)


@pytest.mark.parametrize("config", [SMALL, OTHER, DEEP, WIDE], ids=["small", "other", "deep", "wide"])
@pytest.mark.parametrize("seed", range(5))
def test_clean_kernels_have_no_culprit(seed: int, config: mb.BertConfig) -> None:
    assert_clean(diff(Side(NUMPY), Side(NUMBA), maker(config, seed), batch(seed=seed), step=1 + seed))


def test_clean_cuda_kernels_have_no_culprit() -> None:
    assert_clean(diff(Side(NUMBA), Side(emulator()), maker(TINY), tiny_batch()))
