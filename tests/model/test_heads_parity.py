"""Parity of heads with transformers: logits, losses and gradients, on random configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

import minibert as mb
from tests.model.test_parity import CASES, Case, gradient_deviations, ours, skip_unless_it_runs, tensors, theirs

pytestmark = pytest.mark.parity

SHAPES = ("two heads, right padded", "gelu_pytorch_tanh, holes in the mask")


@dataclass(frozen=True)
class Head:
    architecture: str
    labels: str  # how they are made, see `labels_of`
    config: Mapping[str, Any]


HEADS = {
    "single label": Head("BertForSequenceClassification", "classes", {"num_labels": 5}),
    "two classes by name": Head(
        "BertForSequenceClassification", "classes", {"num_labels": 2, "problem_type": "single_label_classification"}
    ),
    "multi-label": Head("BertForSequenceClassification", "targets", {"num_labels": 4}),
    "regression": Head("BertForSequenceClassification", "numbers", {"num_labels": 1}),
    "regression of three": Head(
        "BertForSequenceClassification", "numbers", {"num_labels": 3, "problem_type": "regression"}
    ),
    "tokens": Head("BertForTokenClassification", "tokens", {"num_labels": 9}),
    "answers": Head("BertForQuestionAnswering", "positions", {}),
    "next sentence": Head("BertForNextSentencePrediction", "classes", {"num_labels": 2}),
}


def labels_of(head: Head, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(11)
    mask, count = batch["attention_mask"], head.config.get("num_labels", 2)
    rows = len(mask)
    if head.labels == "classes":
        labels = rng.integers(0, count, rows)
        labels[1:2] = -100
        return {"labels": labels}
    if head.labels == "tokens":
        kept = (rng.random(mask.shape) < 0.5) & (mask == 1)
        kept[:, 0] = True
        return {"labels": np.where(kept, rng.integers(0, count, mask.shape), -100)}
    if head.labels == "positions":
        ends = [np.flatnonzero(row) for row in mask]
        start, end = (np.array([rng.choice(of) for of in ends]) for _ in range(2))
        end[-1] = mask.shape[1] + 3  # out of range: does not count
        return {"start_positions": start, "end_positions": end}
    floats = rng.random((rows, count)) if head.labels == "targets" else rng.standard_normal((rows, count))
    return {"labels": floats if count > 1 else floats[:, 0]}


def their_loss(head: Head, out: Any, batch: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> Any:
    """Of answers over real tokens alone, where transformers counts padding among them."""
    import torch

    if head.labels != "positions":
        return out.loss
    least = torch.where(torch.from_numpy(batch["attention_mask"] == 1), 0.0, -1e30)
    losses = [
        torch.nn.functional.cross_entropy(logits + least, torch.from_numpy(labels[name]), ignore_index=-100)
        for name, logits in (("start_positions", out.start_logits), ("end_positions", out.end_logits))
    ]
    return sum(losses) / 2


def compared(name: str, shape: str, backend: str, dtype: str) -> tuple[dict[str, float], float]:
    """How far apart gradients are, and loss and logits."""
    head, sizes = HEADS[name], CASES[shape]
    case: Case = replace(sizes, more={**sizes.more, **head.config})
    batch = {k: v for k, v in case.batch().items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    labels = labels_of(head, batch)
    reference = theirs(case, head.architecture, dtype)
    model = ours(case, head.architecture, backend, dtype, reference)
    floats = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in labels.items()}
    expected = reference(**tensors(batch), **tensors(floats))
    if "end_positions" in labels:
        labels["end_positions"][labels["end_positions"] >= batch["input_ids"].shape[1]] = -100
    loss = their_loss(head, expected, batch, labels)
    loss.backward()
    out = model(**batch, **floats)
    out.loss.backward()
    real = batch["attention_mask"] == 1
    apart = abs(out.loss.item() - loss.item())
    for key in ("start_logits", "end_logits") if head.labels == "positions" else ("logits",):
        mine, other = out[key].numpy(), expected[key].detach().numpy()
        if mine.shape[:2] == real.shape and head.labels in ("positions", "tokens"):
            mine, other = mine[real], other[real]
        apart = max(apart, float(np.abs(mine - other).max()))
    gradients = {n: p.grad.numpy() for n, p in reference.named_parameters() if p.grad is not None}
    # The gradient of an answer's bias, and of all that moves both ends of all tokens alike, is zero but for rounding.
    return gradient_deviations(model, gradients, least=1e-2), apart


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", HEADS)
def test_logits_loss_and_gradients_in_float64(name: str, shape: str) -> None:
    gradients, apart = compared(name, shape, "numpy", "float64")
    assert apart < 1e-11 and max(gradients.values()) < 1e-9


@pytest.mark.parametrize("backend", ["numba", "cupy", "emulator"])
@pytest.mark.parametrize("name", HEADS)
def test_logits_loss_and_gradients_in_float32(name: str, backend: str) -> None:
    skip_unless_it_runs(backend)
    gradients, apart = compared(name, SHAPES[0], backend, "float32")
    assert apart < 2e-5 and max(gradients.values()) < 2e-4


@pytest.mark.parametrize("name", HEADS)
def test_folders_written_here_load_there_and_back(name: str, tmp_path: Any) -> None:
    import transformers

    head, case = HEADS[name], CASES[SHAPES[0]]
    case = replace(case, more={**case.more, **head.config})
    model = getattr(mb, head.architecture)(mb.BertConfig.from_dict(case.config()), backend="numpy")
    model.save_pretrained(tmp_path / "ours")
    loaded = getattr(transformers, head.architecture).from_pretrained(tmp_path / "ours")
    assert loaded.config.num_labels == model.config.num_labels
    loaded.save_pretrained(tmp_path / "theirs")
    again, info = getattr(mb, head.architecture).from_pretrained(
        tmp_path / "theirs", backend="numpy", output_loading_info=True
    )
    assert not any(info.values())
    assert all(np.array_equal(array, again.state_dict()[n]) for n, array in model.state_dict().items())
