"""Memory that runs out: passes in parts, which draw the random numbers of the whole, and what cannot be cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import minibert as mb
from minibert import backends
from minibert.backends import Backend, BackendUnavailable
from minibert.backends.numpy_backend import NumpyBackend
from minibert.data import SHIPPED_TEXT, Document, read_documents, train_tokenizer
from minibert.errors import UserError
from minibert.kernels import OPS
from minibert.kernels.array_module import numpy_module
from minibert.kernels.attention import mask_width
from minibert.kernels.philox import Stream, StreamFrom, keep_mask, random_words
from minibert.model.config import BertConfig, ElectraConfig
from minibert.model.electra_pair import ElectraPair
from minibert.train.checkpoint import read_state
from minibert.train.config import TrainingConfig
from minibert.train.loop import Loop
from minibert.train.parts import PARTS, cut, in_memory
from minibert.train.replaced_tokens import ReplacedTokenTrainer
from minibert.train.trainer import Trainer, prepare

TINY = BertConfig(
    vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=32, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.3,
)  # fmt: skip
CONFIG = TrainingConfig(
    max_steps=4, tokens_per_batch=150, max_seq_length=32, gradient_accumulation_steps=2, eval_tokens=64, save_steps=2,
    logging_steps=1,
)  # fmt: skip
STREAM = Stream(7, 5, 3, 2)


@pytest.fixture(scope="module")
def text() -> tuple[list[Document], Tokenizer]:
    documents = read_documents(SHIPPED_TEXT)[:2]
    return documents, train_tokenizer(documents, TINY.vocab_size)


def found(name: str) -> Backend:
    try:
        return backends.get(name)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(params=["numpy", "numba", "emulator"])
def place(request: pytest.FixtureRequest) -> Backend:
    return found(request.param)


# ------------------------------------------------------------------------------------------------ streams in the middle


def test_a_stream_from_a_block_on_goes_on_as_the_whole() -> None:
    later = StreamFrom.of(STREAM, 6)
    assert tuple(later) == tuple(STREAM) and Stream(*later) == STREAM
    assert np.array_equal(random_words(later, 30), random_words(STREAM, 54)[24:])
    assert np.array_equal(random_words(later, 9, start=5), random_words(STREAM, 54)[29:38])


def ran(place: Backend, op: str, *arrays: np.ndarray, **params: Any) -> list[np.ndarray]:
    found = place.run(OPS[op], *(place.asarray(array) for array in arrays), **params)
    return [place.numpy(each) for each in (found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("op", ["dropout", "gumbel", "add_layer_norm", "add_layer_norm_grad"])
def test_rows_from_the_middle_are_those_of_the_whole(op: str, place: Backend) -> None:
    rng, rows, columns, first = np.random.default_rng(0), 11, 12, 5
    x, g = (rng.standard_normal((rows, columns)).astype(np.float32) for _ in range(2))
    weight, bias = (rng.standard_normal(columns).astype(np.float32) for _ in range(2))
    rate: dict[str, Any] = {} if op == "gumbel" else {"rate": 0.4}
    of_rows, beside = ((x, g), ()) if "layer" in op else ((x,), ())
    if op == "add_layer_norm":
        beside = (weight, bias)
    elif op == "add_layer_norm_grad":
        _, z, mean, rstd = ran(place, "add_layer_norm", x, g, weight, bias, stream=STREAM, **rate)
        of_rows, beside = (g, z, mean, rstd), (weight,)

    def given(start: int) -> list[np.ndarray]:
        if op != "add_layer_norm_grad":
            return [array[start:] for array in of_rows] + list(beside)
        gs, zs, means, stds = (array[start:] for array in of_rows)
        return [gs, zs, weight, means, stds]

    whole = ran(place, op, *given(0), stream=STREAM, **rate)
    part = ran(place, op, *given(first), stream=StreamFrom.of(STREAM, first * columns // 4), **rate)
    for all_rows, some in zip(whole, part, strict=True):
        if all_rows.shape[:1] == (rows,):  # the others are sums over rows
            assert np.array_equal(all_rows[first:], some)
    assert any(not np.array_equal(a[:6], b) for a, b in zip(whole, part, strict=True) if a.shape[:1] == (rows,))


def test_attention_of_later_sequences_is_that_of_the_whole(place: Backend) -> None:
    """The longest sequence, by which a query's words are counted, is in the other part."""
    rng, heads, size, lengths, first = np.random.default_rng(0), 3, 8, [13, 22, 5, 9, 1], 2
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    row = ends[first]
    qkv, g = (rng.standard_normal((ends[-1], n * heads * size)).astype(np.float32) for n in (3, 1))
    params: dict[str, Any] = {"num_heads": heads, "rate": 0.4}
    part = StreamFrom.of(STREAM, row * heads * mask_width(ends) // 4, mask_width(ends))
    later = (ends[first:] - row).astype(np.int32)
    whole = ran(place, "attention", qkv, ends, stream=STREAM, **params)
    some = ran(place, "attention", qkv[row:], later, stream=part, **params)
    for all_rows, few in zip(whole, some, strict=True):
        np.testing.assert_allclose(few, all_rows[row:], rtol=2e-6, atol=2e-6)
    (dqkv,) = ran(place, "attention_grad", g, qkv, *whole, ends, stream=STREAM, **params)
    (few,) = ran(place, "attention_grad", g[row:], qkv[row:], *some, later, stream=part, **params)
    np.testing.assert_allclose(few, dqkv[row:], rtol=2e-5, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------------- runs


def pretraining(
    text: tuple[list[Document], Tokenizer], folder: Path, backend: Any = "numpy", dtype: str = "float64",
    model: BertConfig = TINY, **more: Any,
) -> Trainer:  # fmt: skip
    config = replace(CONFIG, **more)
    kind = mb.BertForPreTraining if config.next_sentence else mb.BertForMaskedLM
    return Trainer(kind(model, backend, dtype, seed=1), prepare(*text, config), config, folder)


@contextmanager
def little_memory(run: Loop, rows: int, training: bool = True) -> Iterator[None]:
    """In training, or in evaluation, a linear layer of more than so many rows finds no memory, forward or back."""
    backend, taken = run.model.backend, run.model.backend.run

    def scarce(op: Any, *arrays: Any, **params: Any) -> Any:
        if run.model.training == training and op.name in ("linear_gelu", "linear_grad") and len(arrays[0]) > rows:
            raise MemoryError
        return taken(op, *arrays, **params)

    backend.run = scarce
    try:
        yield
    finally:
        del backend.run


def weights(run: Loop) -> np.ndarray:
    return np.concatenate([array.astype(np.float64).ravel() for array in run.model.state_dict().values()])


def trained(run: Loop) -> np.ndarray:
    for _ in run.run():
        pass
    return weights(run)


@pytest.mark.parametrize("next_sentence", [False, True])
def test_a_run_that_finds_little_memory_learns_the_same(
    next_sentence: bool, text: tuple[list[Document], Tokenizer], tmp_path: Path
) -> None:
    """Its masks are the same bits: without, or with other ones, the weights would part in the first digits."""
    whole = pretraining(text, tmp_path / "whole", next_sentence=next_sentence)
    begun = weights(whole)
    expected = trained(whole)
    run = pretraining(text, tmp_path / "parts", next_sentence=next_sentence)
    with little_memory(run, 76), pytest.warns(UserWarning, match="ran out of memory: .* in (2|4|8) parts") as told:
        found = trained(run)
    assert run.progress[PARTS] == 2 ** len(told) > 1, "150 tokens, in parts of at most 76"
    assert np.linalg.norm(found - expected) < 1e-12 * np.linalg.norm(expected - begun)
    losses = [
        [record["loss"] for record in mb.train.read_log(tmp_path / name) if "loss" in record]
        for name in ("whole", "parts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_an_evaluation_that_finds_little_memory_finds_the_same(
    text: tuple[list[Document], Tokenizer], tmp_path: Path
) -> None:
    run = pretraining(text, tmp_path)
    expected = run.evaluate()
    with little_memory(run, 40, training=False), pytest.warns(UserWarning, match="evaluation .* ran out of memory"):
        found = run.evaluate_and_log()
    assert run.eval_parts > 1 == run.progress[PARTS]
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_an_evaluation_whose_draws_cannot_be_cut_is_not(text: tuple[list[Document], Tokenizer], tmp_path: Path) -> None:
    run = electra(text, tmp_path)
    with little_memory(run, 10, training=False), pytest.raises(MemoryError):
        run.evaluate_and_log()


def test_in_parts_a_run_goes_on_bit_for_bit(text: tuple[list[Document], Tokenizer], tmp_path: Path) -> None:
    run = pretraining(text, tmp_path / "straight", "numba", "float32")
    with little_memory(run, 100), pytest.warns(UserWarning, match="in 2 parts"):
        expected = trained(run)
    begun = pretraining(text, tmp_path / "stopped", "numba", "float32")
    with little_memory(begun, 100), pytest.warns(UserWarning, match="in 2 parts"):
        for kind, record in begun.run():
            begun.stop = kind == "step" and record["step"] == 2
    resumed = pretraining(text, tmp_path / "stopped", "numba", "float32")
    resumed.resume(read_state(tmp_path / "stopped"))
    assert resumed.progress[PARTS] == 2
    with little_memory(resumed, 100):
        assert np.array_equal(trained(resumed), expected)


def test_parts_have_whole_sequences_and_something_to_predict(
    text: tuple[list[Document], Tokenizer], tmp_path: Path
) -> None:
    run = pretraining(text, tmp_path)
    for number in range(12):
        batch = run.batches.batch(number)
        for count in (1, 2, 3, 8, 100):
            parts = cut(batch, count)
            assert 1 <= len(parts) <= min(count, len(batch.cu_seqlens) - 1)
            for name in ("input_ids", "position_ids", "labels"):
                joined = np.concatenate([getattr(part, name) for part, _ in parts])
                assert np.array_equal(joined, getattr(batch, name))
            assert [where.row for _, where in parts] == np.cumsum([0, *(len(p.input_ids) for p, _ in parts)])[
                :-1
            ].tolist()
            assert all(part.counted for part, _ in parts)
            assert all(part.cu_seqlens[-1] == len(part.input_ids) for part, _ in parts)
        assert len(cut(batch, 2)) == 2


# ------------------------------------------------------------------------------------------------- what cannot be cut


def electra(text: tuple[list[Document], Tokenizer], folder: Path) -> Loop:
    config = ElectraConfig(
        vocab_size=200, embedding_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32,
    )  # fmt: skip
    training = replace(CONFIG, objective="rtd")
    return ReplacedTokenTrainer(ElectraPair(config, config, "numpy"), prepare(*text, training), training, folder)


def with_own_kernels(text: tuple[list[Document], Tokenizer], folder: Path) -> Loop:
    place = NumpyBackend("swapped", numpy_module)
    run = pretraining(text, folder, place)
    run.options["swapped"] = swapped = place.using({OPS["dropout"]: None})  # for as long as the run lives
    swapped.__enter__()
    return run


def by_graph(text: tuple[list[Document], Tokenizer], folder: Path) -> Loop:
    return pretraining(text, folder, found("emulator"), "float32", graph=True, gradient_accumulation_steps=1)


def on_anothers_backend(text: tuple[list[Document], Tokenizer], folder: Path) -> Loop:
    class Theirs(NumpyBackend):
        pass

    return pretraining(text, folder, Theirs("theirs", numpy_module))


def odd(text: tuple[list[Document], Tokenizer], folder: Path) -> Loop:
    return pretraining(text, folder, model=replace(TINY, hidden_size=30, intermediate_size=60))


@pytest.mark.parametrize("made", [electra, with_own_kernels, on_anothers_backend, odd])
def test_where_masks_cannot_be_drawn_from_the_middle_memory_is_at_its_end(
    made: Callable[[Any, Path], Loop], text: tuple[list[Document], Tokenizer], tmp_path: Path
) -> None:
    run = made(text, tmp_path)
    with little_memory(run, 10), pytest.raises(MemoryError):
        in_memory(run)
    assert run.progress[PARTS] == 1


@pytest.mark.parametrize("made", [with_own_kernels, by_graph])
def test_parts_that_were_saved_are_not_taken_up_where_they_cannot_be_computed(
    made: Callable[[Any, Path], Loop], text: tuple[list[Document], Tokenizer], tmp_path: Path
) -> None:
    run = made(text, tmp_path)
    run.progress[PARTS] = 2
    with pytest.raises(UserError, match=r"came to 2 parts .* without kernels of your own and without graphs"):
        run.train_step()


def test_a_sequence_is_not_cut(text: tuple[list[Document], Tokenizer], tmp_path: Path) -> None:
    run = pretraining(text, tmp_path)
    with little_memory(run, 3), pytest.warns(UserWarning), pytest.raises(MemoryError):
        in_memory(run)
    assert np.array_equal(keep_mask(np, STREAM, (4,), 0.0), [True] * 4)


TRAIN = """
import json, resource, sys
from minibert.data import SHIPPED_TEXT, read_documents, train_tokenizer
import minibert as mb
documents = read_documents(SHIPPED_TEXT)[:12]
tokenizer = train_tokenizer(documents, 500)
config = mb.train.TrainingConfig(max_steps=2, tokens_per_batch=8192, max_seq_length=64, eval_tokens=64)
model = mb.BertConfig(vocab_size=500, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
                      intermediate_size=1024, max_position_embeddings=64)
data = mb.train.prepare(documents, tokenizer, config)
run = mb.train.Trainer(mb.BertForMaskedLM(model, "numba"), data, config, sys.argv[1])
run.evaluate()  # libraries and kernels are loaded
def size(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))
before, room = size("VmSize"), int(sys.argv[2])
if room:
    resource.setrlimit(resource.RLIMIT_AS, (before + room, before + room))
losses = [run.train_step()["loss"] for _ in range(2)]
print(json.dumps({"parts": run.progress["parts"], "losses": losses, "grown": size("VmPeak") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_process_whose_memory_is_limited_goes_on_in_parts(tmp_path: Path) -> None:
    def child(room: int) -> dict[str, Any]:
        command = [sys.executable, "-W", "ignore", "-c", TRAIN, str(tmp_path / "run"), str(room)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout)

    free = child(0)
    limited = child(round(0.75 * free["grown"]))
    assert free["parts"] == 1 < limited["parts"]
    assert limited["grown"] <= 0.75 * free["grown"]
    assert limited["losses"] == pytest.approx(free["losses"], rel=1e-5)
