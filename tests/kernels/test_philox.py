"""The random words that every backend shares: known answers, streams that do not meet, thresholds."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minibert import backends
from minibert.kernels import OPS
from minibert.kernels.philox import MASK, Stream, keep_mask, philox4x32, random_words, threshold

WORD = st.integers(0, MASK)


# The known answers of Random123 (Salmon et al. 2011), file kat_vectors, philox 4x32 10.
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((MASK,) * 4, (MASK, MASK), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)  # fmt: skip
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], answer: str) -> None:
    words = philox4x32(np, tuple(np.array([c], np.uint64) for c in counter), key)
    assert " ".join(f"{int(w[0]):08x}" for w in words) == answer


@given(WORD, WORD, WORD, WORD, st.integers(0, 40), st.integers(0, 40))
def test_any_part_of_a_stream_can_be_drawn_alone(
    seed: int, stream: int, step: int, layer: int, start: int, count: int
) -> None:
    name = Stream(seed, stream, step, layer)
    whole = random_words(name, 80)
    part = random_words(name, count, start=start)
    assert part.dtype == np.uint32 and part.shape == (count,)
    np.testing.assert_array_equal(part, whole[start : start + count])


def test_elements_are_the_words_of_the_documented_blocks() -> None:
    seed, number, step, layer = 11, 22, 33, 44
    words = random_words(Stream(seed, number, step, layer), 12)
    for i in range(12):
        counter = tuple(np.array([c], np.uint64) for c in (i // 4, layer, step, 0))
        assert words[i] == philox4x32(np, counter, (seed, number))[i % 4][0]


def test_streams_that_differ_in_one_number_share_nothing() -> None:
    names = [Stream(), Stream(seed=1), Stream(stream=1), Stream(step=1), Stream(layer=1)]
    draws = np.stack([random_words(name, 1000) for name in names])
    assert all(np.sum(a == b) <= 1 for i, a in enumerate(draws) for b in draws[i + 1 :])


def test_words_are_uniform_and_neighbours_independent() -> None:
    x = random_words(Stream(7), 1 << 16) / 2.0**32
    counts = np.histogram(x, 64, (0, 1))[0]
    assert abs(((counts - 1024) ** 2 / 1024).sum() - 63) < 5 * np.sqrt(2 * 63)  # chi squared, 63 degrees of freedom
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 5 / 256
    bits = np.unpackbits(random_words(Stream(8), 1 << 12).view(np.uint8)).reshape(-1, 8)
    assert np.all(abs(bits.mean(axis=0) - 0.5) < 5 * 0.5 / np.sqrt(len(bits)))


@pytest.mark.parametrize("rate", [0.0, 2.0**-32, 0.1, 0.5, 0.999])
def test_the_share_dropped_is_the_rate(rate: float) -> None:
    count = 1 << 16
    kept = keep_mask(np, Stream(3, 16), (count // 8, 8), rate)
    assert kept.shape == (count // 8, 8) and kept.dtype == bool
    assert abs(np.mean(~kept) - rate) <= 5 * np.sqrt(rate * (1 - rate) / count)
    words = random_words(Stream(3, 16), count).reshape(kept.shape)
    np.testing.assert_array_equal(kept, words >= threshold(rate))


def test_thresholds_are_integers_and_rise_with_the_rate() -> None:
    assert threshold(0.0) == 0 and threshold(0.5) == 2**31
    assert all(a < b for a, b in pairwise(map(threshold, (0.0, 0.1, 0.5, 0.9, 1 - 2.0**-30))))
    for rate in (-0.1, 1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"dropout rate must lie in \[0, 1\)"):
            threshold(rate)


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 3, 1031)])
def test_every_backend_drops_the_same_elements(shape: tuple[int, ...]) -> None:
    dropout, stream = OPS["dropout"], Stream(2**32 - 1, 16, 2**31, 5)
    kept = keep_mask(np, stream, shape, 0.3)
    for status in backends.available():
        if status.backend is not None:
            ones = status.backend.asarray(np.ones(shape, np.float32))
            y = status.backend.numpy(status.backend.run(dropout, ones, rate=0.3, stream=stream))
            np.testing.assert_array_equal(y != 0, kept, err_msg=status.name)
