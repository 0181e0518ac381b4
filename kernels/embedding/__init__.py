"""embedding: y[n] = word[input_ids[n]] + position[position_ids[n]] + token_type[token_type_ids[n]].

Devlin et al., "BERT" (2019), figure 2. gather_rows: y[k] = x[index[k]]; scatter_rows: y[i] = sum of x[k] over
index[k] == i, the adjoint of gather_rows and so the gradient of an embedding table. Rows at the index `skip` are left
out of both (the padding row of a table gets no gradient). add_rows: total[i] += sum of x[k] over index[k] == i, in
place, so that a table which has a gradient already (tied to the decoder) is touched at the rows of the batch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minibert.kernels.drawing import Drawing
from minibert.kernels.linear import gradients_of
from minibert.kernels.op import Array, BertSize, Op, Run, Sample

MANY_IDS = ({"rows": 3000, "columns": 3, "table": 3000},)  # all different


def _embedding(
    xp: Any, word: Array, position: Array, token_type: Array, input_ids: Array, position_ids: Array,
    token_type_ids: Array, *, padding_idx: int | None = None,
) -> Array:  # fmt: skip
    return word[input_ids] + position[position_ids] + token_type[token_type_ids]


def _gather_rows(xp: Any, x: Array, index: Array, *, skip: int | None = None) -> Array:
    rows = x[index]
    return rows if skip is None else xp.where((index != skip)[:, None], rows, 0.0)


def _scatter_rows(xp: Any, x: Array, index: Array, *, num_rows: int, skip: int | None = None) -> Array:
    if skip is not None:
        kept = xp.flatnonzero(index != skip)
        x, index = x[kept], index[kept]
    return xp.segment_sum(x, index, num_rows)


def _add_rows(xp: Any, total: Array, x: Array, index: Array, *, skip: int | None = None) -> tuple[Array]:
    return (total + _scatter_rows(xp, x, index, num_rows=total.shape[0], skip=skip),)


def _table_gradient(run: Run, number: int, g: Array, table: Array, ids: Array, skip: int | None = None) -> Array:
    """Of input `number`; where autodiff has a gradient of it already, that one, with this added."""
    so_far = getattr(run, "gradient_so_far", None)
    total = None if so_far is None else so_far(number)
    if total is None:
        return gradients_of(run, number)(scatter_rows, g, ids, num_rows=table.shape[0], skip=skip)
    run(add_rows, total, g, ids, skip=skip)
    return total


def _embedding_vjp(
    run: Run, g: Array, outs: Any, word: Array, position: Array, token_type: Array, input_ids: Array,
    position_ids: Array, token_type_ids: Array, *, padding_idx: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    dposition = _table_gradient(run, 1, g, position, position_ids)
    dtoken_type = _table_gradient(run, 2, g, token_type, token_type_ids)
    return _table_gradient(run, 0, g, word, input_ids, padding_idx), dposition, dtoken_type, None, None, None


def _tables(
    rng: np.random.Generator, words: int, columns: int, rows: int, positions: int = 40
) -> tuple[np.ndarray, ...]:
    tables = (rng.standard_normal((n, columns)) for n in (words, positions, 2))
    ids = (rng.integers(0, n, rows).astype(np.int32) for n in (words, positions, 2))
    return (*tables, *ids)


def _samples(rng: np.random.Generator) -> Iterator[Sample]:
    for words, columns, rows in [
        (11, 7, 5),
        (1, 1, 1),
        (50, 65, 1031),
        (5, 3, 40),
        (9, 8, 33),
    ]:  # the last three repeat words
        yield Sample(_tables(rng, words, columns, rows))


def _gathers(rng: np.random.Generator) -> Iterator[Sample]:
    for table, columns, rows, skip in [
        (11, 7, 5, None), (1, 1, 1, None), (50, 65, 1031, 3), (5, 3, 40, 0), (9, 8, 33, None),
    ]:  # fmt: skip
        yield Sample(
            (rng.standard_normal((table, columns)), rng.integers(0, table, rows).astype(np.int32)), {"skip": skip}
        )


def _scatters(rng: np.random.Generator) -> Iterator[Sample]:
    for (x, index), params in _gathers(rng):
        yield Sample((rng.standard_normal((len(index), x.shape[1])), index), {**params, "num_rows": len(x)})
    yield Sample((rng.standard_normal((300, 3)) + 1e4, np.zeros(300, np.int32)), {"num_rows": 2})  # one row gets all
    runs = rng.permutation(np.repeat(np.arange(3, dtype=np.int32), (150, 64, 140)))  # two long ones, one just short
    yield Sample((rng.standard_normal((len(runs), 8)), runs), {"num_rows": 3})


def _additions(rng: np.random.Generator) -> Iterator[Sample]:
    for (x, index), params in _scatters(rng):
        total = 100 * rng.standard_normal((params["num_rows"], x.shape[1]))  # so large that it must be added last
        yield Sample((total, x, index), {"skip": params.get("skip")})


def _draw_embedding(draw: Drawing, rows: int, columns: int, words: int, positions: int = 2**10) -> Sample:
    tables = draw.floats(words, columns), draw.floats(positions, columns), draw.floats(2, columns)
    ids = draw.ids(rows, words), draw.ids(rows, positions), draw.ids(rows, 2)
    return Sample((*tables, *ids), {"padding_idx": draw.among(None, 0)})


def _draw_gather(draw: Drawing, rows: int, columns: int, table: int) -> Sample:
    return Sample((draw.floats(table, columns), draw.ids(rows, table)), {"skip": draw.among(None, 0)})


def _draw_scatter(draw: Drawing, rows: int, columns: int, table: int) -> Sample:
    params = {"num_rows": table, "skip": draw.among(None, 0)}
    return Sample((draw.floats(rows, columns), draw.ids(rows, table)), params)


def _draw_addition(draw: Drawing, rows: int, columns: int, table: int) -> Sample:
    (x, index), params = _draw_scatter(draw, rows, columns, table)
    return Sample((draw.floats(table, columns), x, index), {"skip": params["skip"]})


def _zipf(rng: np.random.Generator, size: BertSize) -> np.ndarray:
    """Word ids as text has them: few words often, many seldom (Zipf)."""
    return (rng.zipf(1.3, size.tokens) % size.vocabulary).astype(np.int32)


def _bench_scatter(rng: np.random.Generator, size: BertSize) -> Sample:
    return Sample((rng.standard_normal((size.tokens, size.hidden)), _zipf(rng, size)), {"num_rows": size.vocabulary})


def _bench_add(rng: np.random.Generator, size: BertSize) -> Sample:
    (x, index), _ = _bench_scatter(rng, size)
    return Sample((rng.standard_normal((size.vocabulary, size.hidden)), x, index))


def _bench_gather(rng: np.random.Generator, size: BertSize) -> Sample:
    index = np.sort(rng.choice(size.tokens, size.predicted, replace=False)).astype(np.int32)
    return Sample((rng.standard_normal((size.tokens, size.hidden)), index))


def _bench_embedding(rng: np.random.Generator, size: BertSize) -> Sample:
    *tables, _, position_ids, type_ids = _tables(rng, size.vocabulary, size.hidden, size.tokens, size.length)
    return Sample((*tables, _zipf(rng, size), position_ids, type_ids))


def _rows_bytes(count: int) -> Any:
    """Of a table only the rows that are named are read: for each, `count` rows are moved."""

    def moved(*arrays: Array, **_: Any) -> int:
        ids = arrays[-1]
        return len(ids) * (count * arrays[0].shape[1] * arrays[0].dtype.itemsize + ids.dtype.itemsize)

    return moved


scatter_rows = Op(
    "scatter_rows",
    _scatter_rows,
    samples=_scatters,
    draw=_draw_scatter,
    sizes=MANY_IDS,
    bench=_bench_scatter,
    vjp=lambda run, g, outs, x, index, *, num_rows, skip=None: (run(gather_rows, g, index, skip=skip), None),
)
add_rows = Op(
    "add_rows",
    _add_rows,
    samples=_additions,
    bench=_bench_add,
    draw=_draw_addition,
    sizes=MANY_IDS,
    writes=(0,),
    bytes=_rows_bytes(3),
)
gather_rows: Op = Op(
    "gather_rows",
    _gather_rows,
    samples=_gathers,
    draw=_draw_gather,
    sizes=MANY_IDS,
    bench=_bench_gather,
    vjp=lambda run, g, outs, x, index, *, skip=None: (
        run(scatter_rows, g, index, num_rows=x.shape[0], skip=skip),
        None,
    ),
    bytes=_rows_bytes(2),
)
embedding = Op(
    "embedding",
    _embedding,
    samples=_samples,
    bench=_bench_embedding,
    draw=_draw_embedding,
    sizes=({"rows": 3000, "columns": 3, "words": 3000, "positions": 1024},),
    vjp=_embedding_vjp,
    bytes=_rows_bytes(4),
)
