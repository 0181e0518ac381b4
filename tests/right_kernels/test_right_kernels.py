"""Right kernels of other making meet every demand; some that are taken for right are refused, each for its reason.

A kernel may add in another order, in one pass, in blocks, with compensation, in more digits; distribute a factor; keep
less and compute it again. Each of those here is as good as the formula, and a check that refuses it is wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from minibert import backends
from minibert.backends.own import own_module
from minibert.kernels import OPS
from minibert.lab.conform.check import CheckResult, check, run_check
from minibert.lab.conform.judge import Judgement, judge
from minibert.lab.conform.own_kernels import load_kernels
from tests.planted import emulator

FOLDER = Path(__file__).parent
SEEDS = range(20)

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


def _refusals(spec: str, place: backends.Backend) -> list[str]:
    with place.using(load_kernels([spec])):
        return [r.message for r in check([spec.rpartition("=")[2]], [place], ["float32"]) if not r.ok]


@pytest.mark.parametrize("spec", list(chain(*_specs().values())), ids=_named)
def test_a_right_kernel_meets_every_demand(spec: str) -> None:
    assert not _refusals(spec, backends.get("numpy"))


@pytest.mark.parametrize("op", _specs())
def test_it_follows_the_formula_on_the_samples_of_20_seeds(op: str) -> None:
    place, refused = backends.get("numpy"), []
    for seed in SEEDS:  # the bounds of one seed serve all kernels
        for spec in _specs()[op]:
            with place.using(load_kernels([spec])):
                result = run_check("follows_formula", OPS[op], place, "float32", seed)
            if not result.ok:
                refused.append(f"{_named(spec)}: {result.message}")
    assert not refused


@pytest.mark.parametrize("op", ON_A_DEVICE)
def test_a_right_cuda_kernel_meets_every_demand(op: str) -> None:
    assert not _refusals(f"{FOLDER / 'device.py'}:{op}={op}", emulator())
