"""Generator and discriminator together: what is drawn, what counts as replaced, what is shared, and their folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare

import minibert as mb
from minibert.kernels import OPS
from minibert.kernels.philox import Stream
from minibert.model.electra_pair import ElectraPair, corrupt, generator_of
from minibert.model.packing import pack
from minibert.train.optim import parameter_groups

CONFIG = mb.ElectraConfig(
    vocab_size=61, embedding_size=12, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
)  # fmt: skip
TEXT = np.random.default_rng(1).integers(5, 61, (3, 11))
MASKED = np.random.default_rng(2).random(TEXT.shape) < 0.4
IDS, LABELS = np.where(MASKED, 4, TEXT), np.where(MASKED, TEXT, -100)
EMBEDDINGS = "discriminator.electra.embeddings.word_embeddings.weight"


def pair_of(backend: str = "numpy", dtype: str = "float32", seed: int = 3, **changes: object) -> ElectraPair:
    config = replace(CONFIG, **changes)
    return ElectraPair(config, generator_of(config, 0.5), backend, dtype, seed)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_where_gumbel_is_largest_is_a_draw_from_the_softmax(backend: str) -> None:
    place = mb.backends.get(backend)
    p = np.array([0.5, 0.25, 0.15, 0.0999, 1e-4])
    x = np.log(np.broadcast_to(p, (40_000, 5))).astype(np.float32)
    drawn, again = (
        place.numpy(place.run(OPS["gumbel"], x, stream=Stream(7, 6, step, 0))).argmax(axis=1) for step in (1, 2)
    )
    assert chisquare(np.bincount(drawn, minlength=5), 40_000 * p).pvalue > 0.01
    assert (drawn == again).mean() == pytest.approx((p**2).sum(), abs=0.01), "two steps are as alike as by chance"


def test_draws_follow_the_generators_guesses() -> None:
    pair = pair_of(seed=5)
    packed = pack(pair.config, IDS, labels=LABELS)
    out = pair.generator(packed)
    logits = out.logits_at(packed.predicted).numpy().astype(np.float64)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    drawn = np.array([pair.drawn(out, packed.predicted, step) for step in range(300)])
    counts = (drawn[:, :, None] == np.arange(61)).mean(axis=0)
    assert np.abs(counts - p).max() < 5 * np.sqrt(p * (1 - p) / 300).max()
    assert counts.argmax(axis=1)[p.max(axis=1) > 0.5].tolist() == p.argmax(axis=1)[p.max(axis=1) > 0.5].tolist()


def test_what_is_drawn_as_it_was_counts_as_original() -> None:
    packed = pack(CONFIG, IDS, labels=LABELS)
    drawn = packed.targets.copy()
    drawn[::2] = (drawn[::2] + 1) % 61
    seen, replaced = corrupt(packed, drawn)
    text = TEXT.reshape(-1)
    np.testing.assert_array_equal(replaced, seen.input_ids != text)
    assert replaced.sum() == len(drawn[::2]) and set(np.flatnonzero(replaced)) <= set(packed.predicted)
    assert packed.input_ids[packed.predicted[0]] == 4, "the generator's own batch is as it was"
    same, none = corrupt(packed, packed.targets)
    assert (same.input_ids == text).all() and not none.any()


def test_the_loss_is_the_sum_and_no_gradient_goes_through_the_draw() -> None:
    pair = pair_of(dtype="float64")
    out = pair(IDS, labels=LABELS)
    assert out.loss.item() == pytest.approx(out.generated.loss.item() + 50 * out.judged.loss.item(), rel=1e-12)
    out.loss.backward()
    both = {name: p.grad.copy() for name, p in pair.named_parameters()}
    pair.zero_grad()
    pair.generator(IDS, labels=LABELS).loss.backward()
    alone = {name: p.grad for name, p in pair.named_parameters() if p.grad is not None}
    for name in alone:
        if name.startswith("generator."):
            np.testing.assert_allclose(both[name], alone[name], rtol=1e-12, atol=1e-15, err_msg=name)
    of_generator = alone[EMBEDDINGS].copy()
    pair.zero_grad()
    seen = out.judged._batch.packed
    np.testing.assert_array_equal(seen.labels, out.replaced)
    pair.discriminator(seen).loss.backward(np.asarray(50.0))
    shared = dict(pair.named_parameters())[EMBEDDINGS]
    np.testing.assert_allclose(both[EMBEDDINGS], of_generator + shared.grad, rtol=1e-12, atol=1e-15)


def test_embeddings_are_one_and_all_else_is_drawn_apart() -> None:
    pair = pair_of()
    names = [name for name, _ in pair.named_parameters()]
    assert EMBEDDINGS in names and not any(name.startswith("generator.electra.embeddings.") for name in names)
    assert pair.generator.electra.embeddings is pair.discriminator.electra.embeddings
    assert pair.num_parameters() == pair.discriminator.num_parameters() + pair.generator_parameters
    arrays = pair.state_dict()
    first, second = (
        arrays[f"{half}.electra.encoder.layer.0.output.dense.weight"].ravel() for half in ("generator", "discriminator")
    )
    assert not np.array_equal(first[:20], second[:20])
    assert pair.generator.config.num_attention_heads == 2 and pair.generator.config.hidden_size == 12
    assert generator_of(CONFIG, 0.01).num_attention_heads == 1
    with pytest.raises(mb.UserError, match="they are shared, so vocab_size, embedding_size"):
        ElectraPair(CONFIG, replace(CONFIG, embedding_size=8), "numpy")


def test_a_step_is_named_by_its_number() -> None:
    pair = pair_of(hidden_dropout_prob=0.1).train()

    def step(number: int) -> tuple[float, list[int]]:
        pair.step = number
        out = pair(IDS, labels=LABELS)
        return out.loss.item(), out.judged._batch.packed.input_ids.tolist()

    assert step(3) == step(3) and step(3)[1] != step(4)[1]


def test_backends_draw_and_judge_alike() -> None:
    outs = [pair_of(backend)(IDS, labels=LABELS) for backend in ("numpy", "numba")]
    np.testing.assert_array_equal(outs[0].replaced, outs[1].replaced)
    assert outs[0].loss.item() == pytest.approx(outs[1].loss.item(), rel=1e-6)
    assert outs[0].accuracy == outs[1].accuracy


def test_the_discriminator_learns_which_tokens_are_not_the_texts() -> None:
    """A text by heart, under new masks and draws at each step: far better than giving all the same chance."""
    sizes = {"hidden_size": 64, "embedding_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    pair = pair_of("numba", initializer_range=0.02, **sizes).train()
    optimizer = mb.AdamW(parameter_groups(pair, 0.0), lr=3e-3, max_grad_norm=1.0)
    rng, losses, shares = np.random.default_rng(4), [], []
    for _ in range(150):
        masked = rng.random(TEXT.shape) < 0.2
        masked[0, 0] = True
        out = pair(np.where(masked, 4, TEXT), labels=np.where(masked, TEXT, -100))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.judged.loss.item())
        shares.append(out.replaced.mean())
    share = np.mean(shares[-50:])
    guessing = -share * np.log(share) - (1 - share) * np.log(1 - share)
    assert np.mean(losses[-50:]) < 0.75 * guessing


def test_a_batch_in_which_nothing_is_masked_is_refused() -> None:
    with pytest.raises(mb.UserError, match="labels: expected those of the masked positions, got none"):
        pair_of()(IDS, labels=np.full(IDS.shape, -100))
    with pytest.raises(mb.UserError, match="labels: expected those of the masked positions, got none"):
        pair_of()(IDS)


def test_folders_hold_both_halves(tmp_path: Path) -> None:
    pair = pair_of().eval()
    pair.save_pretrained(tmp_path)
    mb.ElectraForPreTraining.from_pretrained(tmp_path, "numpy", strict=True)
    mb.ElectraForMaskedLM.from_pretrained(tmp_path / "generator", "numpy", strict=True)
    again = ElectraPair.from_pretrained(tmp_path, "numpy", seed=3)
    np.testing.assert_equal(again.state_dict(), pair.state_dict())
    assert again(IDS, labels=LABELS).loss.item() == pair(IDS, labels=LABELS).loss.item()
    with pytest.raises(mb.UserError, match=r"no generator in .*generator: expected an ElectraForMaskedLM"):
        ElectraPair.from_pretrained(tmp_path / "generator", "numpy")
