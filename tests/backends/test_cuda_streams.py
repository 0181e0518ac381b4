"""What a GPU's queues do to the host side, on the emulator: order, events, uploads ahead, captured graphs, faults.

The emulator runs nothing before somebody waits, and picks a stream anew for each call: mistakes of the host show.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minibert import backends
from minibert.backends import BackendUnavailable
from minibert.backends.emulator.driver import MOST_QUEUED, KernelFault
from minibert.backends.emulator.process import EmulatorCrash
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.philox import Stream

softmax, add, scale, gather_rows, dropout = (OPS[n] for n in ("softmax", "add", "scale", "gather_rows", "dropout"))
DROPOUT = Stream(1, 2, 3, 4)


@pytest.fixture
def backend() -> Any:
    """An emulator for one test, with a queue, a pool and a process of its own."""
    try:
        found: Any = backends.get("emulator")
    except BackendUnavailable as reason:
        pytest.skip(str(reason))
    made = type(found)(type(found.driver)())
    yield made
    made.driver.process.close()


def ones(backend: Any, *shape: int) -> Any:
    return backend.asarray(np.ones(shape, np.float32))


# Queues.


def test_nothing_runs_before_somebody_waits(backend: Any) -> None:
    buffer = np.frombuffer(np.ones(4, np.float32).tobytes(), np.uint8).copy()
    x = backend.empty((4,), np.float32)
    backend.driver.upload(buffer, x.address)
    buffer[:] = np.full(4, 2, np.float32).view(np.uint8)  # a GPU would have read it later too
    assert backend.numpy(x).tolist() == [2, 2, 2, 2]


def test_uploads_do_not_see_what_the_host_writes_later(backend: Any) -> None:
    """`asarray` copies at once, into buffers that are only filled again when they have been read."""
    host, arrays = np.empty(100, np.float32), []
    for i in range(20):
        host[:] = i
        arrays.append(backend.asarray(host))
    assert [backend.numpy(a)[0] for a in arrays] == list(range(20))
    for i in range(20):
        host[:] = i
        backend.synchronize()
        assert backend.numpy(backend.asarray(host))[-1] == i
    assert sum(map(len, backend.host_buffers._read.values())) == 20, "the buffers of the first twenty, used again"


def test_unwritten_memory_is_seen(backend: Any) -> None:
    x = backend.empty((4, 4), np.float32)
    assert np.isnan(backend.numpy(x)).all()
    backend.run(softmax, x)
    with pytest.raises(KernelFault, match=r"softmax: kernel softmax_short: 1 finding\n.*uninitialised read"):
        backend.synchronize()


def test_two_streams_need_an_event(backend: Any) -> None:
    """Without one, some order of the two gives what was there before."""

    def copied(wait: bool) -> float:
        x, y = ones(backend, 8), ones(backend, 8)
        backend.synchronize()
        with backend.driver.on(other):
            backend.driver.fill(x.address, x.nbytes, 0)
            written = backend.driver.record()
        if wait:
            backend.driver.wait(written)
        y[...] = x
        return backend.numpy(y)[0]

    other = backend.driver.new_stream()
    assert {copied(wait=False) for _ in range(20)} == {0, 1}
    assert {copied(wait=True) for _ in range(20)} == {0}


def test_an_event_that_nobody_records(backend: Any) -> None:
    backend.driver.wait([False])
    with pytest.raises(RuntimeError, match="streams wait for events that nothing will record"):
        backend.synchronize()
    assert backend.numpy(ones(backend, 2)).tolist() == [1, 1]


def test_a_fault_is_told_to_who_waits_and_not_lost(backend: Any) -> None:
    """Even where the queue is full when an array dies: there Python would drop the error."""
    x, arrays = ones(backend, 4, 4), [backend.zeros((4,), np.float32) for _ in range(MOST_QUEUED)]
    backend.synchronize()
    backend.run(softmax, backend.empty((4, 4), np.float32))
    arrays.clear()
    assert len(backend.driver._default) > MOST_QUEUED
    with pytest.raises(KernelFault):
        backend.run(softmax, x)
    assert backend.numpy(x)[0, 0] == 1 and backend.numpy(backend.run(softmax, x))[0, 0] == 0.25


def test_after_a_fault_uploads_and_buffers_are_right(backend: Any) -> None:
    for _ in range(3):
        backend.run(softmax, backend.empty((4, 4), np.float32))
        arrays = [backend.asarray(np.full(4, i, np.float32)) for i in range(5)]
        with pytest.raises(KernelFault):
            backend.synchronize()
        assert [backend.numpy(a)[0] for a in arrays] == [0, 1, 2, 3, 4], "queued after it, and not lost"
    assert sum(map(len, backend.host_buffers._read.values())) <= 10, "their buffers are used again"


def test_after_a_crash_another_process_goes_on(backend: Any) -> None:
    x = ones(backend, 4, 4)
    backend.numpy(backend.run(softmax, x))
    backend.driver.process._child.kill()
    with pytest.raises(EmulatorCrash, match="the emulator ended"):
        backend.numpy(backend.run(softmax, x))
    for size in (4, 8, 6, 4):
        y = backend.run(softmax, ones(backend, size, size))
        assert backend.numpy(y)[0, 0] == np.float32(1 / size)
    del y
    assert backend.numpy(x)[0, 0] == 1


def test_python_may_end_with_a_full_queue(root: Path, backend: Any) -> None:
    code = (
        "import numpy as np\nfrom minibert import backends\nfrom minibert.kernels import OPS\n"
        "b = backends.get('emulator')\nx = b.asarray(np.ones((4, 4), np.float32))\n"
        "keep = [b.run(OPS['softmax'], x) for _ in range(20)]\n"
        "with b.capturing() as graph:\n    y = b.run(OPS['softmax'], x)\ngraph.replay({})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Uploads ahead, on a stream of their own.


def test_uploaded_ahead_is_found_and_right(backend: Any) -> None:
    """Step after step, whichever stream is ahead: blocks are not filled again before they have been read."""
    sums, expected = [], []
    for step in range(30):
        host = [np.full((8, 8), step + i, np.float32) for i in range(3)]
        backend.upload_ahead(host)
        for x in host:
            sums.append(backend.run(scale, backend.asarray(x), factor=2.0))
            expected.append(2.0 * x[0, 0])
    assert [backend.numpy(s)[3, 3] for s in sums] == expected


def test_what_was_uploaded_ahead_and_not_asked_for_is_given_back(backend: Any) -> None:
    for _ in range(3):
        backend.upload_ahead([np.ones((64, 64), np.float32)])
    backend.synchronize()
    taken = backend.driver.memory()
    for _ in range(20):
        backend.upload_ahead([np.ones((64, 64), np.float32)])
        backend.synchronize()
    assert backend.driver.memory() == taken


def test_an_array_that_dies_while_the_next_is_uploaded(backend: Any) -> None:
    """Its block waits for the stream that reads it, though the other one is the current one."""
    for _ in range(20):
        first, second = np.full((4, 4), 1, np.float32), np.full((4, 4), 9, np.float32)
        backend.upload_ahead([first])
        x = backend.asarray(first)
        backend.synchronize()
        y = backend.run(add, x, x)
        with backend.driver.on(backend._ahead_stream):
            del x
        backend.upload_ahead([second])
        assert backend.numpy(y)[0, 0] == 2


# Captured graphs.


def test_a_graph_runs_when_it_is_replayed(backend: Any) -> None:
    x = ones(backend, 4, 4)
    with backend.capturing() as graph:
        x[...] = backend.run(add, x, x)
    assert backend.numpy(x)[0, 0] == 1
    for expected in (2, 4, 8):
        graph.replay({})
        assert backend.numpy(x)[0, 0] == expected


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_a_graph_takes_new_inputs(backend: Any, kind: Any) -> None:
    """Also those that are converted on their way."""
    table = backend.asarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    ids = np.array([3, 1, 2], kind)
    with backend.capturing() as graph:
        rows = backend.run(gather_rows, table, backend.asarray(ids, dtype=np.int32))
    graph.bind({"ids": ids})
    for new in ([0, 1, 2], [2, 2, 3]):
        graph.replay({"ids": np.array(new, kind)})
        assert backend.numpy(rows)[:, 0].tolist() == [3 * i for i in new]
    graph.replay({"ids": np.array([0, 0, 1])})
    kept = rows.copy()
    graph.replay({"ids": np.array([3, 3, 3])})  # waits: the first replay has not read its ids yet
    assert backend.numpy(kept)[:, 0].tolist() == [0, 0, 3] and backend.numpy(rows)[0, 0] == 9
    with pytest.raises(ValueError, match=r"a graph of ids \(3,\) was given \(2,\)"):
        graph.replay({"ids": np.array([1, 2])})
    with pytest.raises(KeyError):
        graph.replay({})


def test_integers_that_would_be_stale_are_refused(backend: Any) -> None:
    table, ids = ones(backend, 4, 3), np.array([3, 1], np.int32)
    with backend.capturing() as graph:
        rows = backend.run(gather_rows, table, backend.asarray(ids))
    with pytest.raises(ValueError, match=r"is none of its inputs .labels.: every replay would repeat it"):
        graph.bind({"labels": np.zeros(2, np.int32)})
    with pytest.raises(ValueError, match="inputs a and b are one array"):
        graph.bind({"a": ids, "b": ids})
    assert rows.shape == (2, 3)


def test_numbers_of_a_graph_change_from_replay_to_replay(backend: Any) -> None:
    """The masks are those of the step, as op by op."""
    x = ones(backend, 64, 8)
    with backend.capturing() as graph:
        step = backend.live_int(3)
        y = backend.run(dropout, x, rate=0.5, stream=DROPOUT._replace(step=step))
    for number in (3, 7, 2**32 - 1):
        step.current = number
        graph.replay({})
        expected = backend.run(dropout, x, rate=0.5, stream=DROPOUT._replace(step=number))
        np.testing.assert_array_equal(backend.numpy(y), backend.numpy(expected))


def test_a_graph_derives_from_its_inputs_anew(backend: Any) -> None:
    ids, old = np.array([1, 2], np.int32), backend.asarray(np.array([5]))
    with backend.capturing() as graph:
        given = backend.asarray(ids)
        squares = backend.derived(lambda x: (x**2).astype(np.float32), given.reshape(2, 1))
        with pytest.raises(ValueError, match="arrays that were uploaded within it; this one was not"):
            backend.derived(np.square, old)
    graph.bind({"ids": ids})
    graph.replay({"ids": np.array([7, 3], np.int32)})
    assert backend.numpy(squares).reshape(-1).tolist() == [49, 9]
    assert backend.numpy(backend.derived(np.square, old)).tolist() == [25], "outside of graphs at once"


@pytest.mark.parametrize("wait", [
    lambda b, x: b.numpy(x), lambda b, x: b.synchronize(), lambda b, x: b.asarray(x, dtype=np.float16),
    lambda b, x: b.pool.usual.trim(),
])  # fmt: skip
def test_waiting_within_a_capture_is_refused(backend: Any, wait: Callable[[Any, Any], Any]) -> None:
    x = ones(backend, 4)
    with pytest.raises(RuntimeError, match="while a graph is captured"), backend.capturing():
        wait(backend, backend.run(add, x, x))
    assert backend.capture is None and backend.numpy(backend.run(add, x, x))[0] == 2, "and it goes on"


def test_what_a_graph_cannot_hold_is_refused(backend: Any) -> None:
    x = ones(backend, 4, 4)
    message = r"op softmax has no CUDA kernel.*leave --graph"
    with backend.using({softmax: None}), pytest.raises(UserError, match=message), backend.capturing():
        backend.run(softmax, x)
    with backend.capturing(), pytest.raises(RuntimeError, match="captured already"), backend.capturing():
        pass
    assert backend.capture is None


def test_another_stream_goes_on_while_a_graph_is_captured(backend: Any) -> None:
    other, x, flag = backend.driver.new_stream(), ones(backend, 4), ones(backend, 4)
    backend.synchronize()
    with backend.capturing() as graph:
        doubled = backend.run(add, x, x)
        with backend.driver.on(other):
            backend.driver.fill(flag.address, flag.nbytes, 0)
    assert backend.numpy(flag).tolist() == [0, 0, 0, 0]
    flag[...] = x
    graph.replay({})
    assert backend.numpy(flag).tolist() == [1, 1, 1, 1] and backend.numpy(doubled)[0] == 2


def test_memory_of_graphs_is_theirs_and_comes_back(backend: Any) -> None:
    """Nobody else is given a block that a graph writes; a graph that is gone leaves none behind."""
    x = ones(backend, 32, 32)
    expected = backend.numpy(backend.run(softmax, backend.run(softmax, x)))

    def captured() -> tuple[Any, Any]:
        with backend.capturing() as graph:
            return graph, backend.run(softmax, backend.run(softmax, x))

    graph, y = captured()
    others = [backend.run(scale, x, factor=3.0) for _ in range(4)]
    backend.pool.trim()
    for _ in range(2):
        graph.replay({})
        np.testing.assert_array_equal(backend.numpy(y), expected)
    assert all((backend.numpy(o) == 3).all() for o in others)
    del graph, y, others
    gc.collect()
    used, taken = backend.pool.used, []
    for _ in range(6):
        graph, y = captured()
        graph.replay({})
        np.testing.assert_array_equal(backend.numpy(y), expected)
        del graph, y
        taken.append(backend.driver.memory())
    assert len(set(taken)) == 1 and backend.pool.used == used
    backend.pool.trim()
    assert backend.driver.memory()[0] == backend.driver.total - 4096, "x alone is left"


def test_arrays_from_before_that_die_in_a_capture(backend: Any) -> None:
    """Their blocks serve others afterwards, which no replay disturbs."""
    old, x = ones(backend, 4, 4), ones(backend, 8, 8)
    backend.synchronize()
    with backend.capturing() as graph:
        del old
        y = backend.run(softmax, x)
    new = backend.asarray(np.full((4, 4), 5, np.float32))
    graph.replay({})
    assert backend.numpy(backend.run(add, new, new))[0, 0] == 10 and backend.numpy(y)[0, 0] == 0.125


def test_memory_exhausted_in_a_capture(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setenv("MINIBERT_EMULATOR_MEMORY", "0.01")
    small = type(backend)(type(backend.driver)())
    x = small.asarray(np.zeros((1000, 500), np.float32))
    for _ in range(3):  # lies in the pool, and is given back to the device for the capture
        small.run(softmax, x[:, :400].contiguous())
    with small.capturing() as graph:
        y = small.run(softmax, x)
    graph.replay({})
    assert small.numpy(y)[0, 0] == np.float32(1 / 500)
    with pytest.raises(MemoryError, match=r"softmax asked for 1.9 MiB .* made by softmax"), small.capturing():
        kept: list[Any] = []
        while len(kept) < 5:
            kept.append(small.run(softmax, x))
    del kept, graph, y
    assert small.numpy(small.run(softmax, x))[0, 0] == np.float32(1 / 500)
