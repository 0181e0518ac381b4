"""Ranges on threads give one result, whatever their number; compiled code is kept where it cannot go stale."""

import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import pytest

from minibert.kernels.cpu import team as cpu_team
from minibert.kernels.cpu import threads as cpu_threads
from minibert.kernels.cpu.jit import CODE_SETTINGS, compile_seconds, jit, on_compile, source_hash
from minibert.kernels.cpu.team import add, load, pause
from minibert.kernels.cpu.threads import (
    PIECES_PER_THREAD,
    blocks,
    num_threads,
    rows_worth_a_thread,
    run_rows,
    set_num_threads,
)

KERNELS = Path(cpu_threads.__file__).parents[1]


@pytest.fixture(autouse=True)
def keep_thread_count():
    before = num_threads()
    yield
    set_num_threads(before)


@jit
def square_rows(x, y, start, stop):
    for i in range(start, stop):
        for j in range(x.shape[1]):
            y[i, j] += x[i, j] * x[i, j]


@jit
def sum_blocks(x, size, partial, start, stop):
    for b in range(start, stop):
        part = x[b * size : (b + 1) * size]
        total = np.float32(0)
        for i in range(part.size):
            total += part[i]
        partial[b] = total


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


# --- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 3, 64, 1001])
def test_every_row_is_done_once_on_any_number_of_threads(threads, rows):
    set_num_threads(threads)
    x = np.random.default_rng(0).normal(size=(rows, 33)).astype(np.float32)
    y = np.zeros_like(x)
    run_rows(square_rows, rows, x, y)
    np.testing.assert_array_equal(y, x * x)


def test_sums_over_blocks_have_the_same_bits_on_any_number_of_threads():
    x = np.random.default_rng(1).normal(size=100_003).astype(np.float32)
    sums = []
    for threads in (1, 2, 3):
        set_num_threads(threads)
        partial = np.full(blocks(x.size, 1000), np.nan, np.float32)
        run_rows(sum_blocks, partial.size, x, 1000, partial)
        sums.append(partial)
    assert len(sums[0]) == 101
    np.testing.assert_array_equal(sums[0], sums[1])
    np.testing.assert_array_equal(sums[0], sums[2])
    np.testing.assert_allclose(sums[0].sum(dtype=np.float64), x.sum(dtype=np.float64), rtol=1e-4)


def test_ranges_cover_the_rows_and_hold_a_grain():
    set_num_threads(3)
    seen = []
    run_rows(lambda start, stop: seen.append((start, stop)), 100, grain=7)
    seen.sort()
    assert seen[0][0] == 0 and seen[-1][1] == 100
    assert all(a[1] == b[0] for a, b in pairwise(seen))
    assert len(seen) == PIECES_PER_THREAD * 3 and min(stop - start for start, stop in seen) >= 7


MOST_LOOKS = 2_000_000_000  # minutes: a busy machine may keep the other thread waiting, only a broken team for ever


@jit
def meet(memory, here, start, stop):
    """Marks its range, then waits until two ranges are marked: so it ends early only if two threads are in it."""
    here[start] = 1
    arrived = add(memory, 0, 1)
    looks = 0
    while load(memory, 0) < 2 and looks < MOST_LOOKS:
        pause()
        looks += 1
    if arrived < 2:
        here[start] = 2 if looks < MOST_LOOKS else -1


def two_threads_meet():
    words, here = np.zeros(1, np.int64), np.zeros(8)
    run_rows(meet, 8, words.ctypes.data, here)
    return (here == 2).sum() == 2


def test_work_is_spread_over_threads_also_after_they_slept():
    set_num_threads(2)
    for pause_between in (0, 0.05, 0, 0.5):
        time.sleep(pause_between)
        assert two_threads_meet()


def test_idle_threads_sleep_and_those_no_longer_wanted_end():
    set_num_threads(3)
    x, y = np.ones((10, 3), np.float32), np.zeros((10, 3), np.float32)
    run_rows(square_rows, 10, x, y)
    team = cpu_threads._team
    assert team is not None and within(300, lambda: team._words[cpu_team.ASLEEP] == 2)
    members = {thread for thread in threading.enumerate() if thread.name.startswith("minibert-")}
    set_num_threads(2)
    assert within(300, lambda: sum(thread.is_alive() for thread in members) <= len(members) - 2)
    run_rows(square_rows, 10, x, y)
    assert (y == 2).all()


def within(seconds, condition):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return False


def test_little_work_stays_here():
    set_num_threads(2)
    names = []
    run_rows(lambda start, stop: names.append((threading.get_ident(), start, stop)), 8, grain=5)
    assert names == [(threading.get_ident(), 0, 8)]
    run_rows(lambda start, stop: names.append("called"), 0)
    assert len(names) == 1


@jit
def fail_once(x, failing, start, stop):
    for i in range(start, stop):
        x[i] += 1
        if i == failing:
            raise FloatingPointError("a row that fails")


@pytest.mark.parametrize("failing", [0, 5, 9])
def test_an_exception_in_compiled_code_comes_out_when_all_have_stopped(failing):
    set_num_threads(3)
    x = np.zeros(10)
    with pytest.raises(FloatingPointError, match="a row that fails"):
        run_rows(fail_once, 10, x, failing)
    assert (np.delete(x, failing) >= 1).all()
    run_rows(fail_once, 10, x, -1)


def test_a_kernel_that_returns_something_is_refused():
    @jit
    def result(x, start, stop):
        return x[start]

    set_num_threads(2)
    with pytest.raises(TypeError, match="a kernel returns nothing, and result returns float64"):
        run_rows(result, 10, np.zeros(10))


@jit
def note_kinds(total, x, numbers, flag, start, stop):
    wide, narrow = numbers
    for i in range(start, stop):
        total[i] = x[i] + np.float64(wide >> 60) + narrow + (100 if flag else 0)


def test_arguments_of_other_types_meet_other_code():
    set_num_threads(2)
    for x in (np.ones(9), np.ones(9, np.float32), np.ones(18)[::2], np.broadcast_to(np.ones(1), 9)):
        for wide in (1 << 63, 1 << 60):
            for narrow in (np.float32(0.5), 2, 0.25):
                for flag in (True, False):
                    total = np.zeros(9)
                    run_rows(note_kinds, 9, total, x, (wide, narrow), flag)
                    assert (total == 1 + (wide >> 60) + float(narrow) + 100 * flag).all()


@pytest.mark.parametrize("failing", [0, 5, 9])
def test_an_exception_comes_out_and_the_pool_lives_on(failing):
    set_num_threads(3)

    def fail(start, stop):
        if start <= failing < stop:
            raise FloatingPointError(f"row {failing}")

    with pytest.raises(FloatingPointError, match=f"row {failing}"):
        run_rows(fail, 10)
    x, y = np.ones((10, 3), np.float32), np.zeros((10, 3), np.float32)
    run_rows(square_rows, 10, x, y)
    assert y.sum() == 30


def test_two_callers_at_once_and_a_changing_number_of_threads():
    x = np.random.default_rng(2).normal(size=(64, 50)).astype(np.float32)
    wrong = []

    def call():
        for _ in range(100):
            y = np.zeros_like(x)
            run_rows(square_rows, 64, x, y)
            if not np.array_equal(y, x * x):
                wrong.append(1)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for i in range(50):
        set_num_threads(1 + i % 4)
    for caller in callers:
        caller.join(600)
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_threads_of_its_own():
    code = (
        "import os, numpy as np\n"
        "from minibert.kernels.cpu.jit import jit\n"
        "from minibert.kernels.cpu.threads import run_rows, set_num_threads\n"
        "set_num_threads(3)\n"
        "hits = np.zeros(9)\n"
        "@jit\n"
        "def mark(hits, start, stop): hits[start:stop] += 1\n"
        "run_rows(mark, 9, hits)\n"
        "child = os.fork()\n"
        "run_rows(mark, 9, hits)\n"
        "if child: print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), hits.tolist())\n"
        "else: os._exit(0 if hits.tolist() == [2] * 9 else 3)\n"
    )
    done = python(code)
    assert done.stdout.strip() == f"0 {[2.0] * 9}", done.stderr


def test_the_number_of_threads_comes_from_the_environment():
    show = "from minibert.kernels.cpu.threads import num_threads; print(num_threads())"
    assert python(show, MINIBERT_NUM_THREADS="5").stdout.strip() == "5"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert python(show, MINIBERT_NUM_THREADS="").stdout.strip() == str(cores)


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_wrong_number_in_the_environment_is_named(text):
    done = python("from minibert.kernels.cpu.threads import num_threads; num_threads()", MINIBERT_NUM_THREADS=text)
    assert done.stderr.strip().splitlines()[-1] == (
        f"ValueError: MINIBERT_NUM_THREADS must be a whole number above 0, got {text!r}"
    )


@pytest.mark.parametrize("count", [0, -3, 1.5, True, None])
def test_a_wrong_number_of_threads_is_refused(count):
    before = num_threads()
    with pytest.raises(ValueError, match="must be a whole number above 0"):
        set_num_threads(count)
    assert num_threads() == before


def test_wide_rows_are_worth_a_thread_sooner():
    assert rows_worth_a_thread(1) > rows_worth_a_thread(768) > rows_worth_a_thread(100_000) == 1
    assert rows_worth_a_thread(768, cost=10) < rows_worth_a_thread(768)


# --- compiling -------------------------------------------------------------------------------------------------------


def test_the_hash_of_the_sources_sees_every_edit(tmp_path):
    tree = tmp_path / "kernels"
    shutil.copytree(KERNELS, tree, ignore=shutil.ignore_patterns("__pycache__"))
    original = source_hash(tree)
    assert original == source_hash(KERNELS)
    helper = tree / "cpu/math.py"
    helper.write_text(helper.read_text() + "# edited\n")
    edited = source_hash(tree)
    (tree / "softer").mkdir()
    (tree / "softer" / "cpu.py").write_text("")
    added = source_hash(tree)
    (tree / "softer" / "cpu.py").rename(tree / "softer" / "gpu.py")
    assert len({original, edited, added, source_hash(tree)}) == 4


@pytest.mark.parametrize("setting", CODE_SETTINGS)
def test_the_hash_sees_what_numba_is_told_of_the_code(setting, monkeypatch):
    before = source_hash(KERNELS)
    monkeypatch.setattr(numba.config, setting, 2)
    assert source_hash(KERNELS) != before


def test_code_is_kept_in_the_named_folder_and_loaded_from_it(tmp_path):
    kernel = tmp_path / "mine.py"
    kernel.write_text(
        "import numba\n"
        "from minibert.kernels.cpu.jit import compile_seconds, jit, on_compile\n"
        "@jit\n"
        "def double(x, start, stop):\n"
        "    for i in range(start, stop):\n"
        "        x[i] *= 2\n"
        "if __name__ == '__main__':\n"
        "    import numpy as np\n"
        "    x = np.ones(3, np.float32)\n"
        "    with on_compile(lambda c: print(c.name, c.dtype, end=' ')):\n"
        "        double(x, 1, 3)\n"
        "    print(x.tolist(), compile_seconds() > 0, numba.config.CACHE_DIR)\n"
    )
    run = f"import runpy; runpy.run_path({str(kernel)!r}, run_name='__main__')"
    environment = {"MINIBERT_CACHE_DIR": str(tmp_path / "cache"), "NUMBA_CACHE_DIR": str(tmp_path / "theirs")}
    first, second = python(run, **environment), python(run, **environment)
    assert first.stdout.strip() == f"double float32 [1.0, 2.0, 2.0] True {tmp_path / 'theirs'}", first.stderr
    assert second.stdout.strip() == f"[1.0, 2.0, 2.0] False {tmp_path / 'theirs'}", second.stderr
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name == f"kernels-{source_hash(KERNELS)}" and list(folder.rglob("*double*.nbc"))
    assert not (tmp_path / "theirs").exists()


def test_code_of_sources_long_gone_is_removed(tmp_path):
    old, recent, other = (tmp_path / name for name in ("kernels-" + "0" * 16, "kernels-" + "1" * 16, "kernels-mine"))
    for folder in (old, recent, other):
        folder.mkdir()
        (folder / "code").touch()
    for folder in (old, other):
        os.utime(folder, (0, 0))
    assert python("import minibert.kernels.cpu.jit", MINIBERT_CACHE_DIR=str(tmp_path)).returncode == 0
    assert not old.exists() and recent.exists() and other.exists()


def test_without_a_writable_folder_it_warns_once_and_compiles(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    code = (
        "import numpy as np\n"
        "from minibert.kernels.cpu.math import exp, philox_row\n"
        "from minibert.kernels.cpu.jit import jit\n"
        "def one(x, start, stop): x[start] = exp(x[start])\n"
        "x = np.zeros(2); jit(one)(x, 1, 2); print(x.tolist())\n"
    )
    done = python(code, MINIBERT_CACHE_DIR=str(blocked))
    assert done.stdout.strip() == "[0.0, 1.0]", done.stderr
    assert done.stderr.count("compiled kernels are not kept") == 1 and "MINIBERT_CACHE_DIR" in done.stderr


def test_numbas_own_cache_folder_is_left_alone(monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "theirs")
    jit(square_rows.py_func)
    assert numba.config.CACHE_DIR == "theirs"
    with pytest.raises(AttributeError):
        jit(3)
    assert numba.config.CACHE_DIR == "theirs"


def test_compilations_of_our_kernels_are_announced_and_timed(tmp_path):
    namespace = {}
    exec("def halve(x, start, stop):\n for i in range(start, stop):\n  x[i] *= 0.5", namespace)  # no file: not cached
    ours, theirs = jit(namespace["halve"]), numba.njit(lambda x: x + 1)
    heard, seconds = [], compile_seconds()
    with on_compile(heard.append):
        theirs(1)
        assert compile_seconds() == seconds
        ours(np.ones(2, np.float32), 0, 2)
        ours(np.ones(2, np.float32), 0, 2)
        ours(np.ones(2, np.float64), 0, 2)
    assert [(c.name, c.dtype) for c in heard] == [("halve", "float32"), ("halve", "float64")]
    assert "float32" in heard[0].signature and compile_seconds() > seconds
    ours(np.ones(2, np.int64), 0, 2)
    assert len(heard) == 2


@pytest.mark.parametrize("startable", [0, 1])
def test_work_is_finished_where_no_further_thread_starts(startable: int, monkeypatch: pytest.MonkeyPatch) -> None:
    set_num_threads(1)
    set_num_threads(4)
    started = []
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if len(started) == startable:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        original(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    x, y = np.ones((16, 3), np.float32), np.zeros((16, 3), np.float32)
    run_rows(square_rows, 16, x, y)
    assert len(started) == startable and y.all()
