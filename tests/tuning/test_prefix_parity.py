"""Prefix tuning beside Hugging Face PEFT, which can do it on BERT with transformers 4 alone."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.errors import pip_install
from minibert.tuning import load_peft_model
from tests.small_model import IDS, QUIET

pytestmark = pytest.mark.parity
peft = pytest.importorskip(
    "peft", reason=f"peft is not installed: {pip_install('--no-deps', 'peft==0.21.2', 'accelerate', 'psutil')}"
)
if int(importlib.metadata.version("transformers").split(".")[0]) > 4:
    pytest.skip("peft's prefix tuning wants transformers 4, a venv apart", allow_module_level=True)

TEXTS = replace(QUIET, id2label={0: "no", 1: "yes", 2: "perhaps"})
CASES = {
    "texts": ("BertForSequenceClassification", TEXTS, {"task_type": "SEQ_CLS", "num_virtual_tokens": 5}),
    "tokens": ("BertForTokenClassification", TEXTS, {"task_type": "TOKEN_CLS", "num_virtual_tokens": 1}),
    "answers": ("BertForQuestionAnswering", QUIET, {"task_type": "QUESTION_ANS", "num_virtual_tokens": 12}),
    "a table that two layers made": (
        "BertForSequenceClassification", TEXTS,
        {"task_type": "SEQ_CLS", "num_virtual_tokens": 4, "prefix_projection": True},
    ),
}  # fmt: skip
MASK = np.array([[1] * 11, [1] * 4 + [0] * 7, [1] * 8 + [0] * 3])


def real(values: Any) -> np.ndarray:
    """Outputs, those of padding apart."""
    arrays = [np.asarray(v) for v in values]
    return np.concatenate([(a[MASK == 1] if a.shape[:2] == MASK.shape else a).ravel() for a in arrays])


def output(model: Any, torchs: bool = False) -> np.ndarray:
    if not torchs:
        return real(model(IDS, MASK).to_tuple())
    import torch

    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(IDS), attention_mask=torch.from_numpy(MASK))
    return real(v.numpy() for k, v in out.items() if "logits" in k)


@pytest.mark.parametrize("architecture, config, prefix", CASES.values(), ids=CASES.keys())
def test_files_go_to_and_fro(tmp_path: Path, architecture: str, config: mb.BertConfig, prefix: dict[str, Any]) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    getattr(mb, architecture)(config, seed=3).save_pretrained(tmp_path / "base")

    def theirs() -> Any:
        return getattr(transformers, architecture).from_pretrained(tmp_path / "base", attn_implementation="eager")

    def ours() -> Any:
        return getattr(mb, architecture).from_pretrained(tmp_path / "base")

    torch.manual_seed(1)
    reference = peft.get_peft_model(theirs(), peft.PrefixTuningConfig(**prefix)).eval()
    with torch.no_grad():
        for p in reference.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    expected = output(reference, torchs=True)
    assert np.abs(expected - output(ours())).max() > 1e-2
    reference.save_pretrained(tmp_path / "theirs")
    model = load_peft_model(ours(), tmp_path / "theirs", is_trainable=True)
    np.testing.assert_allclose(output(model), expected, rtol=0, atol=3e-5)
    model.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(theirs(), tmp_path / "ours").eval()
    np.testing.assert_allclose(output(back, torchs=True), expected, rtol=0, atol=3e-5)


def test_training_takes_the_same_way(tmp_path: Path) -> None:
    import torch
    import transformers

    labels = np.array([2, 0, 1])
    mb.BertForSequenceClassification(TEXTS, seed=3).save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", attn_implementation="eager")
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5)
    reference = peft.get_peft_model(base, config).eval()
    reference.save_pretrained(tmp_path / "theirs")
    plain = mb.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    model = load_peft_model(plain, tmp_path / "theirs", is_trainable=True)
    their_optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=3e-3)
    optimizer = mb.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(4):
        their_optimizer.zero_grad()
        ids, mask = torch.from_numpy(IDS), torch.from_numpy(MASK)
        their_loss = reference(input_ids=ids, attention_mask=mask, labels=torch.from_numpy(labels)).loss
        their_loss.backward()
        their_optimizer.step()
        optimizer.zero_grad()
        loss = model(IDS, MASK, labels=labels).loss
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(their_loss.item(), abs=5e-5)
