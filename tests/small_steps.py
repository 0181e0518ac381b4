"""Training steps of very small models, for tests of `minibert diff`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert import backends
from minibert.cli.diff_report import verdict
from minibert.data import PackedBatch
from minibert.kernels import OPS
from minibert.lab.lockstep.diff import Difference
from minibert.model.config import NAMED

NUMPY, NUMBA = backends.get("numpy"), backends.get("numba")
SMALL = mb.BertConfig(
    vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    max_position_embeddings=64,
)  # fmt: skip
OTHER = dataclasses.replace(
    SMALL, hidden_size=48, num_hidden_layers=1, num_attention_heads=3, hidden_act="gelu_new", hidden_dropout_prob=0.0,
    tie_word_embeddings=False,
)  # fmt: skip
DEEP = dataclasses.replace(
    SMALL, hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40,
    attention_probs_dropout_prob=0.3,
)  # fmt: skip
WIDE = dataclasses.replace(
    SMALL, hidden_size=96, num_hidden_layers=1, num_attention_heads=1, intermediate_size=96, hidden_dropout_prob=0.5
)
TINY = dataclasses.replace(
    SMALL, vocab_size=64, hidden_size=16, num_hidden_layers=1, intermediate_size=32, max_position_embeddings=32
)
LENGTHS = (17, 30, 5, 1, 40)


@contextmanager
def smaller_tiny() -> Iterator[None]:
    """Within the block the configuration "tiny", which commands take by default, is a quarter as wide."""
    with pytest.MonkeyPatch.context() as patch:
        narrow = dataclasses.replace(NAMED["tiny"], hidden_size=32, num_attention_heads=2, intermediate_size=64)
        patch.setitem(NAMED, "tiny", narrow)
        yield


def maker(config: mb.BertConfig = SMALL, seed: int = 0) -> Callable[[Any, str], Any]:
    return lambda backend, dtype: mb.BertForMaskedLM(config, backend, dtype=dtype, seed=seed)


def batch(vocabulary: int = 300, seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> PackedBatch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, vocabulary, sum(lengths)).astype(np.int32)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    labels = np.where(rng.random(len(ids)) < 0.2, ids, -100).astype(np.int64)
    labels[0] = ids[0]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return PackedBatch(ids, positions, (positions > 8).astype(np.int32), starts, labels)


def tiny_batch() -> PackedBatch:
    return batch(64, lengths=(7, 5, 1))


def assert_clean(found: Difference) -> None:
    assert found.ok, verdict(found)
    assert not found.unjudged
    assert not found.broken
    assert "no culprit" in verdict(found)
    assert len(found.rows) > 50
    assert all(row.b is not None and row.b.judgement.unbounded == 0 for row in found.rows)


def wrong(op: str, factor: float = 1.01) -> Callable[..., Any]:
    """A kernel whose first output is too large."""

    def kernel(*arrays: Any, **params: Any) -> Any:
        with NUMBA.unwatched(), NUMBA.using({OPS[op]: NUMBA._find(OPS[op])}):
            result = NUMBA.run(OPS[op], *arrays, **params)
        first, *rest = result if isinstance(result, tuple) else (result,)
        return (first * first.dtype.type(factor), *rest) if rest else first * first.dtype.type(factor)

    return kernel
