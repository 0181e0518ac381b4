"""What every test shares: the repository's folder, repeatable hypothesis runs, which tests are fast, and the reason
parity tests skip."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import CodeType

import hypothesis
import pytest

from minibert.backends import Backend

os.environ.pop("COLUMNS", None)  # tables are tested as they are in a pipe, whole; xdist would have them 80 wide

ROOT = Path(__file__).resolve().parent.parent

# What `make test-fast` leaves out, each for what stands above it: modules, and as MODULE::NAME single tests of others,
# or all of their tests that use a fixture or call a function. What is not here is fast: whoever adds a test that takes
# seconds names it.
SLOW = frozenset(
    f"tests/{name}"
    for names in (
        # CUDA that is compiled, by g++ for the emulator or by NVRTC
        "backends/test_cublaslt.py backends/test_cuda_backend.py backends/test_cuda_matmul.py",
        "backends/test_cuda_products.py backends/test_cuda_streams.py backends/test_cupy_driver.py",
        "backends/test_emulator.py backends/test_emulator_toolchain.py backends/test_nvrtc.py",
        "cli/test_kernel_budget.py kernels/test_barriers.py kernels/test_gpu_elementwise.py kernels/test_gpu_linear.py",
        "kernels/test_gpu_int8.py kernels/test_gpu_loss_and_update.py kernels/test_planted_faults.py",
        "kernels/test_planted_launches.py",
        "train/test_cuda_training.py test_docs_cuda.py faults/test_cuda_faults.py::first_failure",
        # measurements
        "bench/test_bench.py bench/test_bench_ablation.py bench/test_bench_ops.py bench/test_bench_scaling.py",
        "bench/test_bench_tasks.py::test_both_sides_compute_the_same",
        "bench/test_gpu_check.py bench/test_gpu_check_measures.py",
        "lab/compare/test_compare.py lab/compare/test_compare_tasks.py model/test_memory.py",
        # processes of their own, installations, a browser
        "backends/test_deterministic.py cli/test_watch.py lab/conform/test_conformance.py lab/conform/test_guarded.py",
        "cli/test_search.py::test_processes_share_the_trials_and_what_one_left_another_goes_on_with",
        "page/test_page_browser.py test_docs.py test_fast.py test_wheel.py kernels/test_overlap.py",
        "kernels/test_regression.py train/test_checkpoint.py::test_a_process_that_is_killed",
        "cli/test_signals.py cli/test_full_disk.py cli/test_jobs.py cli/test_read_only.py",
        "kernels/test_cache.py::test_what_is_damaged_is_compiled_anew_with_a_warning",
        "train/test_parts.py::test_a_process_whose_memory_is_limited_goes_on_in_parts",
        "train/test_memory.py::test_prediction_is_near_what_is_measured",
        "train/test_memory.py::test_a_device_with_as_much_as_was_told_is_enough",
        "train/test_memory.py::test_a_run_too_large_for_its_device_is_refused",
        "data/test_long_texts.py torture/test_texts.py",
        # every mistake that can be made in a formula or a kernel
        "faults/test_faults.py::put lab/conform/test_drawn.py",
        "right_kernels/test_right_kernels.py::test_right_kernels_follow_the_formula",
        "right_kernels/test_right_kernels.py::test_right_kernels_meet_the_other_demands",
        "right_kernels/test_right_kernels.py::test_right_cuda_kernels_meet_every_demand",
        "right_kernels/test_right_kernels.py::test_what_multiplies_by_0_spreads_what_is_not_finite",
        "lab/conform/test_check.py::test_a_kernel_that_zeroes_its_last_row_above_some_number_of_rows_is_caught",
        "test_hostile_files.py::test_mutated_files_are_read_or_refused_in_a_line",
        "lab/conform/test_check.py::test_backend_meets_what_is_drawn kernels/test_exact.py kernels/test_orders.py",
        "kernels/test_formula_mutation.py kernels/test_mutation.py kernels/test_random_formulas.py",
        "train/test_checkpoint.py::stopping_at tasks/test_finetune_killed.py tasks/test_exact_resume.py",
        "torture/test_kills.py::test_runs_that_are_killed_end_as_those_left_alone",
        "torture/test_kills.py::test_moments_that_are_lost_are_seen",
        # kernels compiled in many ways, or on many threads
        "kernels/test_cpu_microkernel.py kernels/test_cpu_product.py kernels/test_cpu_threads.py kernels/test_int8.py",
        "kernels/test_vectorised.py kernels/test_cpu_math.py::test_float32_stays_within_its_ulp_over_all_bit_patterns",
        # runs of many steps, drawings of whole pages
        "lab/lockstep/test_bisect.py lab/lockstep/test_diff.py lab/lockstep/test_diff_sides.py",
        "tasks/test_quantize.py model/test_foreign_checkpoints.py model/test_parity.py data/test_tokenizer_parity.py",
        "model/test_recompute.py::test_a_model_that_forgets_until_backward_has_the_same_gradients",
        "page/test_page.py::page page/test_page.py::small_facts page/test_page_recorded.py::small_facts",
        "lab/compare/test_compare_facts.py::test_the_page_is_made_of_what_was_found",
        "lab/compare/test_compare_facts.py::test_a_report_is_a_folder_with_a_page_and_its_facts",
        "lab/compare/test_compare_facts.py::test_crossovers_are_those_of_a_kernel_of_ones_own",
        "lab/compare/test_compare_facts.py::test_json_alone_needs_no_page_and_measures_no_crossovers",
        "train/test_train.py::test_interrupt_saves_and_resume_goes_on train/test_train.py::test_loss_falls",
        "train/test_train.py::test_backends_agree_with_dropout_on cli/test_own_backends.py",
        "cli/test_tables.py::test_a_terminal_of_80_columns_cuts_no_word",
        "cli/test_tables.py::test_check_shows_what_was_computed_and_where_a_kernel_broke cli/test_nonfinite.py",
        "lab/compare/test_compare_facts.py::test_one_backend_and_float64_have_reports_too",
        "tasks/test_finetune_runs.py::test_a_run_stopped_at_any_step_goes_on_as_if_it_had_not",
        "train/test_train.py::test_resumed_run_has_the_same_bits",
        "model/test_changed_weights.py::test_a_replayed_step_changes_the_weights_too",
    )
    for name in names.split()
)
SLOW_BACKENDS = {"emulator", "cupy"}  # as a test's parameters name them

# The same inputs on every run; no deadline, since the first call of a kernel compiles it.
hypothesis.settings.register_profile("minibert", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("minibert")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk: what a process has written stays, though it is killed."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's folder."""
    return ROOT


@pytest.fixture(scope="module")
def smaller_tiny() -> Iterator[None]:
    """For tests that run commands in this process: see `tests.small_steps`."""
    from tests import small_steps

    with small_steps.smaller_tiny():
        yield


def names_in(code: CodeType) -> Iterator[str]:
    """What a function calls by name, in its comprehensions too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from names_in(constant)


def is_fast(item: pytest.Function) -> bool:
    """Whether `make test-fast` runs a test."""
    module = item.path.relative_to(ROOT).as_posix()
    names = item.originalname, *item.fixturenames, *names_in(item.function.__code__)
    slow = SLOW & {module, *(f"{module}::{name}" for name in names)}
    given = item.callspec.params.values() if hasattr(item, "callspec") else ()
    on = {value.name if isinstance(value, Backend) else value for value in given if isinstance(value, str | Backend)}
    return not slow and not on & SLOW_BACKENDS and item.get_closest_marker("parity") is None


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, what is slow as a whole is not even imported."""
    inside = config.option.markexpr == "fast" and collection_path.is_relative_to(ROOT)
    return True if inside and collection_path.relative_to(ROOT).as_posix() in SLOW else None


@pytest.hookimpl(tryfirst=True)  # before pytest chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Mark what is fast; skip parity tests, with the reason and the remedy, where their libraries are not installed."""
    for item in items:
        if is_fast(item):
            item.add_marker("fast")
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if not missing:
        return
    from minibert.errors import pip_install

    skip = pytest.mark.skip(reason=f"needs {' and '.join(missing)}: {pip_install('[parity]')}")
    for item in items:
        if item.get_closest_marker("parity"):
            item.add_marker(skip)
