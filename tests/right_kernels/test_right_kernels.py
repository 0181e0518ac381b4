"""Right kernels of other making meet every demand; some that are taken for right are refused, each for its reason.

A kernel may add in another order, in one pass, in blocks, with compensation, in more digits; distribute a factor; keep
less and compute it again. Each of those here is as good as the formula, and a check that refuses it is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.op import Sample
from minibert.lab.conform.check import check
from minibert.lab.conform.judge import Judgement, expect, judge_against, stored_as
from minibert.lab.conform.own_kernels import load_kernels
from tests.planted import emulator

FOLDER = Path(__file__).parent
SEEDS = range(20)
SMALL = 10000  # elements; larger samples are judged at one seed

# file -> "op: functions ..." for each op; every function stands in for the op as `--kernel FILE.py:FUNCTION=OP` has it
RIGHT = {
    "softmax.py": (
        "softmax: online powers_of_two split through_logarithm reciprocal",
        "softmax_grad: grad_reversed grad_distributed grad_wide",
    ),
    "cross_entropy.py": ("cross_entropy: online wide", "linear_cross_entropy: linear_in_chunks"),
    "products.py": (
        "matmul: sequential backwards compensated split wide",
        "linear: transposed bias_as_a_column bias_first",
        "linear_gelu: gelu_through_erfc",
        "linear_grad: grad_by_rows grad_in_einsum",
        "add_linear_grad: add_grad_by_rows",
    ),
    "sums.py": (
        "reduce_sum: sequential kahan neumaier double_float wide axis_by_axis",
        "square_norm: norm_in_chunks norm_scaled norm_sequential norm_in_lanes",
    ),
    "layer_norm.py": (
        "layer_norm: welford shifted corrected folded merged",
        "layer_norm_grad: grad_recomputing grad_by_rows grad_scaled_first",
        "add_layer_norm: add_fused",
        "add_layer_norm_grad: add_grad_recomputing",
    ),
    "attention.py": (
        "attention: tiled online powers_of_two",
        "attention_grad: grad_delta_from_p grad_p_from_scores grad_by_keys",
    ),
    "activation.py": (
        "gelu: gelu_by_erfc gelu_wide",
        "gelu_grad: gelu_grad_by_erfc",
        "relu: relu_where",
        "relu_grad: relu_grad_branch",
        "tanh: tanh_by_expm1 tanh_by_sinh",
        "tanh_grad: tanh_grad_factored tanh_grad_distributed",
    ),
    "rows.py": (
        "gather_rows: gather_by_masks gather_in_loops",
        "scatter_rows: scatter_in_order scatter_by_bincount scatter_by_sorting",
        "add_rows: add_rows_at add_rows_last",
        "embedding: embedding_reversed embedding_wide",
        "dropout: dropout_by_division",
    ),
    "adamw.py": ("adamw: lerp folded wide", "adamw_shadow: shadow_by_chunks", "clip_scale: clip_by_branch"),
}
ON_A_DEVICE = ("softmax", "layer_norm", "square_norm", "linear", "scatter_rows")  # of device.py, each by its op's name


def _specs() -> dict[str, list[str]]:
    """The right kernels of each op."""
    found = defaultdict(list)
    for file, lines in RIGHT.items():
        for op, _, functions in (line.partition(": ") for line in lines):
            found[op] += [f"{FOLDER / file}:{function}={op}" for function in functions.split()]
    return found


def _named(spec: str) -> str:
    return Path(spec).name


def _kernel(spec: str) -> Callable[..., Any]:
    return next(iter(load_kernels([spec]).values())).kernel


def _judged(op: str, kernels: Sequence[Callable[..., Any]], sample: Sample) -> list[Judgement]:
    """Of each kernel on one sample in float32; the bound is worked out once."""
    given = [np.asarray(a) for a in sample.arrays]
    kinds = stored_as(OPS[op], given, "float32")
    arrays = [np.asarray(a, kind) for a, kind in zip(given, kinds, strict=True)]
    expected, found = expect(OPS[op], arrays, sample.params, "float32"), []
    for kernel in kernels:
        own = [a.copy() for a in arrays]
        with np.errstate(all="ignore"):
            got = kernel(*own, **sample.params)
        found.append(judge_against(expected, tuple(own[i] for i in OPS[op].writes) or got))
    return found


def _refusals(spec: str, place: backends.Backend) -> list[str]:
    with place.using(load_kernels([spec])):
        return [r.message for r in check([spec.rpartition("=")[2]], [place], ["float32"]) if not r.ok]


@pytest.mark.parametrize("spec", list(chain(*_specs().values())), ids=_named)
def test_a_right_kernel_meets_every_demand(spec: str) -> None:
    assert not _refusals(spec, backends.get("numpy"))


@pytest.mark.parametrize("op", _specs())
def test_it_follows_the_formula_on_the_small_samples_of_20_seeds(op: str) -> None:
    kernels = {_named(spec): _kernel(spec) for spec in _specs()[op]}
    refused = []
    for seed in SEEDS:
        for number, sample in enumerate(OPS[op].samples(np.random.default_rng(seed))):
            if max(map(np.size, sample.arrays)) <= SMALL:
                for name, judgement in zip(kernels, _judged(op, list(kernels.values()), sample), strict=True):
                    if not judgement.ok:
                        refused.append(f"{name}: seed {seed}, sample {number}: {judgement.problem or judgement.worst}")
    assert not refused


@pytest.mark.parametrize("op", ON_A_DEVICE)
def test_a_right_cuda_kernel_meets_every_demand(op: str) -> None:
    assert not _refusals(f"{FOLDER / 'device.py'}:{op}={op}", emulator())
