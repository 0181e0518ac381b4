"""Bottleneck adapters beside the library `adapters`: what one trained gives the same outputs in the other.

It wants transformers 4.57, so an environment of its own: pip install adapters==1.3.0
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.tuning import BnConfig, DoubleSeqBnConfig, SeqBnConfig, get_peft_model, load_peft_model
from tests.small_model import IDS, LABELS, QUIET

pytestmark = pytest.mark.parity
adapters = pytest.importorskip("adapters", reason="adapters is not installed: it wants transformers 4.57, a venv apart")

TEXTS = replace(QUIET, id2label={0: "no", 1: "yes", 2: "perhaps"})
CASES: dict[str, tuple[str, mb.BertConfig, BnConfig]] = {
    "houlsby": ("BertForSequenceClassification", TEXTS, DoubleSeqBnConfig(name="a")),
    "pfeiffer": ("BertForTokenClassification", TEXTS, SeqBnConfig(name="a", reduction_factor=5)),
    "answers, scaled": ("BertForQuestionAnswering", QUIET, DoubleSeqBnConfig(name="a", scaling=2.5, leave_out=[1])),
    "an encoder": ("BertModel", QUIET, DoubleSeqBnConfig(name="a", non_linearity="gelu", reduction_factor=2)),
    "both orders": ("BertForSequenceClassification", TEXTS, BnConfig(name="a", original_ln_before=True)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> None:
    """Its pool and Numba's would spin for the same cores."""
    import torch

    torch.set_num_threads(1)


def theirs(architecture: str, folder: Path) -> Any:
    import transformers

    model = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager")
    adapters.init(model)
    return model.eval()


def output(model: Any, torchs: bool = False) -> np.ndarray:
    """All that comes out of a model, in one array."""
    if not torchs:
        return np.concatenate([np.asarray(v).ravel() for v in model(IDS).to_tuple()])
    import torch

    with torch.no_grad():
        return np.concatenate([v.numpy().ravel() for v in model(torch.from_numpy(IDS)).to_tuple()])


@pytest.mark.parametrize("architecture, config, adapter", CASES.values(), ids=CASES.keys())
def test_files_go_to_and_fro(tmp_path: Path, architecture: str, config: mb.BertConfig, adapter: BnConfig) -> None:
    import torch

    getattr(mb, architecture)(config, seed=3).save_pretrained(tmp_path / "base")

    def ours() -> Any:
        return getattr(mb, architecture).from_pretrained(tmp_path / "base")

    reference = theirs(architecture, tmp_path / "base")
    reference.add_adapter("a", config=adapters.BnConfig.load(adapter.to_dict()))
    reference.train_adapter("a")
    torch.manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    trained = sum(p.numel() for p in reference.parameters() if p.requires_grad)
    expected = output(reference, torchs=True)
    assert np.abs(expected - output(ours())).max() > 1e-2
    reference.save_adapter(str(tmp_path / "theirs"), "a", use_safetensors=True)
    model = load_peft_model(ours(), tmp_path / "theirs", is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == trained
    np.testing.assert_allclose(output(model), expected, rtol=0, atol=2e-5)
    model.save_pretrained(tmp_path / "ours")
    again = theirs(architecture, tmp_path / "base")
    again.load_adapter(str(tmp_path / "ours"), use_safetensors=True, set_active=True)
    np.testing.assert_allclose(output(again, torchs=True), expected, rtol=0, atol=2e-5)


def test_training_takes_the_same_way(tmp_path: Path) -> None:
    import torch

    labels = np.where(LABELS < 0, LABELS, LABELS % 3)
    mb.BertForTokenClassification(TEXTS, seed=3).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        mb.BertForTokenClassification.from_pretrained(tmp_path / "base"),
        DoubleSeqBnConfig(name="a", reduction_factor=4),
    )
    model.save_pretrained(tmp_path / "ours")
    reference = theirs("BertForTokenClassification", tmp_path / "base")
    reference.load_adapter(str(tmp_path / "ours"), use_safetensors=True, set_active=True)
    reference.train_adapter("a")
    their_optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=3e-3)
    optimizer = mb.AdamW(model.parameters(), lr=3e-3)
    reference.eval(), model.train()
    for _ in range(4):
        their_optimizer.zero_grad()
        their_loss = reference(torch.from_numpy(IDS), labels=torch.from_numpy(labels)).loss
        their_loss.backward()
        their_optimizer.step()
        optimizer.zero_grad()
        loss = model(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(their_loss.item(), abs=5e-5)
