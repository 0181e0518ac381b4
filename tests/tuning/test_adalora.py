"""AdaLoRA: how much is pruned when, what is pruned, what comes back, and that a run goes on from its state alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import minibert as mb
from minibert.tuning import AdaLoraConfig, PeftModel, get_peft_model
from tests.small_model import IDS, LABELS, logits, masked_lm

STEPS = 8
FIRST = "bert.encoder.layer.0.attention.self.query"


def tuned(**config: Any) -> Any:
    return get_peft_model(masked_lm(), AdaLoraConfig(**{"init_r": 4, "target_r": 2, "total_step": STEPS, **config}))


class Run:
    """Steps of a training, one by one."""

    def __init__(self, model: Any) -> None:
        self.model, self.step = model.train(), 0
        self.optimizer = mb.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)

    def to(self, step: int) -> Run:
        while self.step < step:
            self.step += 1
            self.model(IDS, labels=LABELS).loss.backward()
            self.model.before_update()
            self.optimizer.step()
            self.model.update_and_allocate(self.step, self.optimizer.clip_factor)
            self.optimizer.zero_grad()
        return self


def entries(model: Any) -> np.ndarray:
    """(layers, r) E of every layer."""
    return np.stack([layer.lora_E.numpy()[:, 0] for layer in model.layers.values()])


def test_training_begins_at_the_model_and_leaves_its_weights() -> None:
    model = tuned()
    np.testing.assert_array_equal(logits(model), logits(masked_lm()))
    digest = model.base_sha256()
    Run(model).to(3)
    assert model.base_sha256() == digest
    assert np.abs(logits(model.eval()) - logits(masked_lm())).max() > 1e-3


@pytest.mark.parametrize("config, budgets", [
    ({"total_step": 5}, [24, 18, 14, 12, 12, 12, 12]),  # 12 + 12 (1 - t / 5)^3, cut
    ({"total_step": 8, "tinit": 2, "tfinal": 2}, [24, 24, 24, 17, 13, 12, 12, 12, 12]),  # 12 + 12 (1 - (t - 2) / 4)^3
], ids=str)  # fmt: skip
def test_the_budget_falls_as_a_cube_between_its_phases(config: dict[str, Any], budgets: list[int]) -> None:
    allocator = tuned(**config).allocator
    assert [allocator.budget(step) for step in range(len(budgets))] == budgets


def test_pruned_entries_come_back_between_prunings_and_stay_away_in_the_end() -> None:
    model = tuned(deltaT=2, tfinal=2)
    run, kept = Run(model), []
    for step in range(1, STEPS + 1):
        run.to(step)
        kept.append(int((entries(model) != 0).sum()))
    # cut at steps 2 and 4, whole again one step later; from step 6 = total_step - tfinal on as in the end
    assert kept[0] == kept[2] == kept[4] == 24 and kept[5:] == [12, 12, 12]
    assert [kept[1], kept[3]] == [model.allocator.budget(2), model.allocator.budget(4)]
    assert sum(model.ranks().values()) == 12


def test_importance_is_smoothed_sensitivity_times_its_uncertainty() -> None:
    """By hand, over three steps of given values and gradients."""
    model = tuned(beta1=0.6, beta2=0.7, tinit=5, total_step=9)
    rng, layer = np.random.default_rng(0), model.layers[FIRST]
    smooth, spread = ({name: 0.0 for name in "ABE"} for _ in range(2))
    for step in range(1, 4):
        for name in "ABE":
            p = getattr(layer, f"lora_{name}")
            p.assign(rng.standard_normal(p.shape))
            p.grad = rng.standard_normal(p.shape).astype(np.float32)
            seen = abs(p.numpy().astype(float) * 0.5 * p.grad)
            smooth[name] = 0.6 * smooth[name] + 0.4 * seen
            spread[name] = 0.7 * spread[name] + 0.3 * abs(seen - smooth[name])
        model.update_and_allocate(step, clip_factor=0.5)
    s = {name: np.asarray(smooth[name] * spread[name]) for name in "ABE"}
    expected = s["E"][:, 0] + s["A"].mean(axis=1) + s["B"].mean(axis=0)
    np.testing.assert_allclose(model.allocator.importance(FIRST), expected, rtol=1e-5)


def test_all_that_tie_with_the_last_to_be_pruned_are_pruned() -> None:
    model = tuned(total_step=2)
    allocator, importance = model.allocator, {}
    for i, name in enumerate(model.layers):
        importance[name] = np.array([0.0, 1, 1, 2]) if i % 2 else np.array([1.0, 3, 4, 5])
    allocator.importance = importance.__getitem__
    allocator.updates = 1
    allocator._prune(20)  # 4 of 24 are to go: three zeros and one of nine ones, with which all of them go
    assert [kept.tolist() for kept in allocator.kept.values()][:2] == [
        [False, True, True, True], [False, False, False, True],
    ]  # fmt: skip
    assert sum(model.ranks().values()) == 12


def test_the_regulariser_is_a_mean_of_norms_that_are_not_squared_and_is_added_once_for_an_update() -> None:
    model = tuned(init_lora_weights=False, orth_reg_weight=0.25)
    norms = []
    for layer in model.layers.values():
        for p in (layer.lora_A.numpy(), layer.lora_B.numpy().T):
            norms.append(np.linalg.norm(p.astype(float) @ p.T - np.eye(4)))
    term = model.orthogonality()
    assert term.item() == pytest.approx(np.mean(norms), rel=1e-5)
    term.backward()
    a = model.layers[FIRST].lora_A
    off = a.numpy().astype(float) @ a.numpy().T - np.eye(4)
    np.testing.assert_allclose(a.grad, 2 * off @ a.numpy() / np.linalg.norm(off) / len(norms), rtol=1e-4)
    once = np.array(a.grad)
    assert model.before_update() == pytest.approx(0.25 * term.item(), rel=1e-5)
    np.testing.assert_allclose(a.grad, 1.25 * once, rtol=1e-5)
    for p in model.trained().values():
        p.grad = None
    model(IDS, labels=LABELS).loss.backward()
    plain = {name: np.array(p.grad) for name, p in model.trained().items()}
    model.before_update()
    np.testing.assert_allclose(a.grad - plain[f"base_model.model.{FIRST}.lora_A"], 0.25 * once, rtol=1e-3, atol=1e-6)
    assert (model.layers[FIRST].lora_E.grad == plain[f"base_model.model.{FIRST}.lora_E"]).all()
    assert tuned(orth_reg_weight=0.0).before_update() == 0


def test_orthogonal_factors_have_no_gradient_from_the_regulariser_and_no_nan() -> None:
    model = tuned()
    for layer in model.layers.values():
        layer.lora_A.assign(np.eye(4, 24))
        layer.lora_B.assign(np.eye(24, 4))
    assert model.orthogonality().item() == 0


@pytest.mark.parametrize("stop", [2, 5, 7])
def test_a_run_that_goes_on_from_its_state_prunes_alike(stop: int) -> None:
    config: dict[str, Any] = {"deltaT": 2, "tfinal": 2, "lora_dropout": 0.1}
    whole, first = Run(tuned(**config)).to(STEPS), Run(tuned(**config)).to(stop)
    second = Run(tuned(**config))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step, second.model.step = first.step, first.model.step
    second.to(STEPS)
    assert second.model.ranks() == whole.model.ranks()
    for name, values in whole.model.state_dict().items():
        np.testing.assert_array_equal(second.model.state_dict()[name], values)
    state = first.model.state_dict()
    del state["adalora.sensitivity." + FIRST + ".lora_E"]
    with pytest.raises(mb.UserError, match=r"missing: sensitivity\..*query.lora_E"):
        second.model.load_state_dict(state)


def test_files_are_cut_to_the_ranks_and_come_back(tmp_path: Path) -> None:
    model = Run(tuned(target_r=1, lora_alpha=16)).to(STEPS).model.eval()
    kept = model.allocator.kept
    kept[FIRST][:] = False  # a layer that has nothing left
    model.layers[FIRST].keep(kept[FIRST])
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    for name, mask in kept.items():
        rank = int(mask.sum())
        assert pattern[f"{name}.lora_E"] == mask.tolist()
        shapes = [held[f"base_model.model.{name}.lora_{kind}"].shape for kind in "ABE"]
        assert shapes == [(rank, 24), (24, rank), (rank, 1)]
    loaded: Any = PeftModel.from_pretrained(masked_lm(), tmp_path, is_trainable=True)
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert loaded.ranks() == model.ranks() and loaded.ranks()[FIRST] == 0
    before = loaded.ranks()
    Run(loaded).to(2)
    assert loaded.ranks() == before
    loaded.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(masked_lm(), tmp_path)
    np.testing.assert_array_equal(logits(again), logits(loaded.eval()))
    np.testing.assert_allclose(logits(again.merge_and_unload()), logits(loaded), rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", [4, 5])
def test_what_is_saved_at_a_pruning_or_between_two_is_the_model_as_it_is(step: int, tmp_path: Path) -> None:
    model = Run(tuned(deltaT=2)).to(step).model.eval()
    model.save_pretrained(tmp_path)
    loaded: Any = PeftModel.from_pretrained(masked_lm(), tmp_path)
    np.testing.assert_allclose(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert sum(loaded.ranks().values()) == (24 if step == 5 else model.allocator.budget(4))


WRONG = {
    "no steps": ({"total_step": None}, "total_step: expected the steps of the whole training"),
    "no time to prune": ({"tinit": 5, "tfinal": 3}, "tinit: expected less than total_step - tfinal"),
    "ranks that grow": ({"target_r": 5}, "target_r: expected at most init_r, 4"),
    "average": ({"beta1": 1.0}, r"beta1: expected a number in \(0, 1\)"),
    "regulariser": ({"orth_reg_weight": -0.5}, "orth_reg_weight"),
    "scaling by name": ({"alpha_pattern": {"query": 2}}, "alpha_pattern: expected nothing"),
    "pattern": ({"rank_pattern": {f"{FIRST}.lora_E": [True] * 4}}, "rank_pattern: with AdaLoRA it comes out"),
    "short pattern": ({"rank_pattern": {f"{FIRST}.lora_E": [True]}}, "a list of 4 times true or false"),
    "an embedding": ({"target_modules": ["word_embeddings"]}, "ADALORA has no update of bert.embeddings.word"),
    "dora": ({"use_dora": True}, "use_dora"),
}


@pytest.mark.parametrize("config, message", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(mb.UserError, match=message):
        tuned(**config)


def test_a_pattern_that_is_not_of_these_layers_is_refused(tmp_path: Path) -> None:
    Run(tuned()).to(STEPS).model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["rank_pattern"][f"{FIRST}.lora_E"]
    path.write_text(json.dumps(values))
    model = masked_lm()
    with pytest.raises(mb.UserError, match=f"one entry for each layer that is tuned, but not so '{FIRST}'"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_to_prune_before_or_without_gradients_is_refused() -> None:
    model = tuned()
    with pytest.raises(mb.UserError, match=r"after step\(\) and before zero_grad"):
        model.update_and_allocate(1)
    with pytest.raises(mb.UserError, match="after every step, from the first on"):
        model.update_and_allocate(STEPS)
