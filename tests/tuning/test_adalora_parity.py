"""AdaLoRA beside Hugging Face PEFT: the same losses, the same triplets pruned after every step, the same files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import minibert as mb
from minibert.errors import pip_install
from minibert.tuning import AdaLoraConfig, AdaLoraModel, PeftModel, get_peft_model
from minibert.tuning.adalora import NAMES
from tests.small_model import QUIET

pytestmark = pytest.mark.parity
peft = pytest.importorskip(
    "peft", reason=f"peft is not installed: {pip_install('--no-deps', 'peft==0.21.2', 'accelerate', 'psutil')}"
)

IDS = np.random.default_rng(1).integers(1, 61, (8, 3, 11))  # a batch for each of some steps
LABELS = np.where(np.random.default_rng(2).random(IDS.shape) < 0.5, IDS, -100)

CASES: dict[str, dict[str, Any]] = {
    "every step": {"init_r": 4, "target_r": 2, "total_step": 8},
    "phases, every other step": {
        "init_r": 5, "target_r": 1, "total_step": 8, "tinit": 2, "tfinal": 2, "deltaT": 2, "lora_alpha": 20,
        "target_modules": ["query", "value", "output.dense"],
    },
    "nothing to prune": {"init_r": 3, "target_r": 3, "total_step": 8, "orth_reg_weight": 0.0},
    "clipped, other averages": {
        "init_r": 4, "target_r": 1, "total_step": 8, "tfinal": 1, "beta1": 0.5, "beta2": 0.3,
        "target_modules": ["key", "intermediate.dense"], "orth_reg_weight": 0.1,
    },
}  # fmt: skip


def theirs(folder: Path) -> Any:
    import transformers

    return transformers.BertForMaskedLM.from_pretrained(folder, attn_implementation="eager")


def ours(folder: Path) -> Any:
    return mb.BertForMaskedLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base")
    mb.BertForMaskedLM(QUIET, seed=3).save_pretrained(folder)
    return folder


def both(base: Path, config: dict[str, Any]) -> tuple[Any, AdaLoraModel]:
    """Their model and ours, which begins where theirs does, and theirs with E that is not 0."""
    import torch

    torch.manual_seed(0)
    reference = peft.get_peft_model(theirs(base), peft.AdaLoraConfig(**config)).train()
    model: Any = get_peft_model(ours(base), AdaLoraConfig(**config)).train()
    for name, p in reference.named_parameters():
        if p.requires_grad:
            if "lora_E" in name:
                torch.nn.init.normal_(p, std=0.3)
            model.trained()[name.replace(".default", "")].assign(p.detach().numpy())
    return reference, model


def logits(model: Any, torchs: bool = False) -> np.ndarray:
    if not torchs:
        return model(IDS[0]).logits.numpy()
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS[0])).logits.numpy()


@pytest.mark.parametrize("config", CASES.values(), ids=CASES.keys())
def test_training_and_pruning_take_the_same_way_and_files_go_to_and_fro(
    base: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    import torch

    reference, model = both(base, config)
    trained = [p for p in reference.parameters() if p.requires_grad]
    clip = 0.5 if config.get("beta1") == 0.5 else None
    their_optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    optimizer = mb.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, max_grad_norm=clip)
    pruned = []
    for step, (ids, labels) in enumerate(zip(IDS, LABELS, strict=True), 1):
        # without a task_type their model itself leaves the regulariser out
        their_loss = reference.base_model(torch.from_numpy(ids), labels=torch.from_numpy(labels)).loss
        their_loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trained, clip)
        their_optimizer.step()
        if config["target_r"] < config["init_r"]:  # else torch.kthvalue(k=0) raises there
            reference.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()
        loss = model(ids, labels=labels).loss
        loss.backward()
        total = loss.item() + model.before_update()
        optimizer.step()
        model.update_and_allocate(step, optimizer.clip_factor)
        optimizer.zero_grad()
        assert total == pytest.approx(their_loss.item(), abs=1e-4)
        pattern = reference.peft_config["default"].rank_pattern or {}
        for name, kept in pattern.items():
            layer = name.removeprefix("base_model.model.").removesuffix(".default").removesuffix(".lora_E")
            assert model.allocator.kept[layer].tolist() == kept
        pruned.append(sum(sum(kept) for kept in pattern.values()))
        for name, p in reference.named_parameters():
            if "lora_E" in name:
                got = model.trained()[name.replace(".default", "")].numpy()
                np.testing.assert_array_equal(got == 0, p.detach().numpy() == 0)
    if config["target_r"] < config["init_r"]:
        assert pruned[-1] == config["target_r"] * len(model.layers) < config["init_r"] * len(model.layers)
        assert sum(model.ranks().values()) == pruned[-1]
    model.eval(), reference.eval()
    expected = logits(reference, torchs=True)
    np.testing.assert_allclose(logits(model), expected, rtol=0, atol=2e-3)
    reference.save_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    of_theirs, of_ours = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert {n: a.shape for n, a in of_theirs.items()} == {n: a.shape for n, a in of_ours.items()}
    loaded = PeftModel.from_pretrained(ours(base), tmp_path / "theirs")
    np.testing.assert_allclose(logits(loaded), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits(loaded.merge_and_unload()), expected, rtol=0, atol=2e-5)
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(back, torchs=True), logits(model), rtol=0, atol=2e-5)


def test_a_rank_of_0_goes_to_and_fro(base: Path, tmp_path: Path) -> None:
    """All triplets of a layer pruned: tensors without elements."""
    model: Any = get_peft_model(ours(base), AdaLoraConfig(init_r=3, target_r=1, total_step=4, init_lora_weights=False))
    first = next(iter(model.layers))
    for name, layer in model.layers.items():
        for kind in NAMES:
            getattr(layer, kind).assign(0.3 * getattr(layer, kind).numpy())
        model.allocator.kept[name] = np.array([True, False, True]) if name != first else np.zeros(3, bool)
        layer.keep(model.allocator.kept[name])
    model.allocator.pruned = True
    expected = logits(model)
    assert np.abs(expected - logits(ours(base))).max() > 1e-2
    model.save_pretrained(tmp_path / "ours")
    shapes = {n: a.shape for n, a in load_file(tmp_path / "ours/adapter_model.safetensors").items() if first in n}
    assert {*shapes.values()} == {(0, 24), (24, 0), (0, 1)}
    back = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    np.testing.assert_allclose(logits(back, torchs=True), expected, rtol=0, atol=2e-5)
    back.save_pretrained(tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/adapter_config.json").read_text())["rank_pattern"]
    loaded = PeftModel.from_pretrained(ours(base), tmp_path / "theirs")
    np.testing.assert_allclose(logits(loaded), expected, rtol=0, atol=2e-5)
    assert isinstance(loaded, AdaLoraModel) and loaded.ranks()[first] == 0
    np.testing.assert_allclose(logits(loaded.merge_and_unload()), expected, rtol=0, atol=2e-5)
