"""LoRA beside Hugging Face PEFT: what one trained gives the same outputs in the other, and merged too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.errors import pip_install
from minibert.tuning import LoraConfig, PeftModel, get_peft_model
from tests.small_model import IDS, LABELS, QUIET

pytestmark = pytest.mark.parity
peft = pytest.importorskip(
    "peft", reason=f"peft is not installed: {pip_install('--no-deps', 'peft==0.21.2', 'accelerate', 'psutil')}"
)

TIGHT = {"rtol": 0, "atol": 2e-5}

NAMES = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "defaults": ("BertForMaskedLM", {}, {}),
    "all linear layers": ("BertForMaskedLM", {}, {"target_modules": "all-linear", "r": 3, "lora_alpha": 16}),
    "ranks and alphas by name": (
        "BertForMaskedLM", {},
        {"target_modules": ["query", "key", "output.dense"], "r": 4, "use_rslora": True,
         "rank_pattern": {r"layer\.1.*query": 2, "output.dense": 6}, "alpha_pattern": {"key": 3}},
    ),
    "all biases, untied": ("BertForMaskedLM", {"tie_word_embeddings": False}, {"bias": "all"}),
    "all biases": ("BertForMaskedLM", {}, {"bias": "all", "target_modules": ["value"]}),
    "their biases, some layers": (
        "BertForMaskedLM", {}, {"bias": "lora_only", "layers_to_transform": [0, 2], "target_modules": ["dense"]},
    ),
    "a regex": ("BertForPreTraining", {}, {"target_modules": r".*(layer\.2.*query|seq_relationship)"}),
    "the pooler whole": ("BertModel", {}, {"modules_to_save": ["pooler"], "target_modules": ["dense"]}),
    "texts": ("BertForSequenceClassification", NAMES, {"task_type": "SEQ_CLS"}),
    "texts, all linear layers and biases": (
        "BertForSequenceClassification", NAMES, {"task_type": "SEQ_CLS", "target_modules": "all-linear", "bias": "all"},
    ),
    "tokens": (
        "BertForTokenClassification", NAMES, {"task_type": "TOKEN_CLS", "target_modules": ["key", "dense"], "r": 2},
    ),
    "answers": ("BertForQuestionAnswering", {}, {"task_type": "QUESTION_ANS", "target_modules": ["dense", "key"]}),
    "a head that stays": ("BertForNextSentencePrediction", {}, {"target_modules": ["value"]}),
    "embeddings": (
        "BertForSequenceClassification", NAMES,
        {"task_type": "SEQ_CLS", "target_modules": ["word_embeddings", "token_type_embeddings", "value"]},
    ),
    "wide A": ("BertForMaskedLM", {}, {"init_lora_weights": "gaussian", "exclude_modules": ["1.attention.self.value"]}),
}  # fmt: skip


def drawn(seed: int) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A configuration that nobody thought of."""
    draw = Random(seed)
    targets = draw.sample(["query", "key", "value", "output.dense", "intermediate.dense"], 3)
    config = {
        "r": draw.randint(1, 9), "lora_alpha": draw.randint(1, 32), "use_rslora": draw.random() < 0.5,
        "target_modules": targets,
        "bias": draw.choice(["none", "all", "lora_only"]),
        "rank_pattern": {draw.choice(targets): draw.randint(1, 9)},
        "alpha_pattern": {rf"layer\.\d.*{draw.choice(targets)}": draw.randint(1, 32)},
        "layers_to_transform": draw.choice([None, [1], [0, 2]]),
    }  # fmt: skip
    return draw.choice(["BertModel", "BertForMaskedLM", "BertForPreTraining"]), {}, config


CASES |= {f"drawn {seed}": drawn(seed) for seed in range(4)}


@pytest.fixture(scope="module", autouse=True)
def one_thread_for_torch() -> None:
    """Its pool and Numba's would spin for the same cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with a model of some architecture and config, made once."""
    made: dict[str, Path] = {}

    def folder(architecture: str, **changes: Any) -> Path:
        key = f"{architecture} {changes}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("base")
            getattr(mb, architecture)(replace(QUIET, **changes), seed=3).save_pretrained(made[key])
        return made[key]

    return folder


def theirs(architecture: str, folder: Path) -> Any:
    import transformers

    return getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager")


def ours(architecture: str, folder: Path) -> Any:
    return getattr(mb, architecture).from_pretrained(folder)


def output(model: Any, torchs: bool = False) -> np.ndarray:
    """All that comes out of a model, in one array."""
    if torchs:
        import torch

        with torch.no_grad():
            values = model(torch.from_numpy(IDS)).to_tuple()
    else:
        values = model(IDS).to_tuple()
    return np.concatenate([np.asarray(v).ravel() for v in values])


def scramble(model: Any) -> None:
    """Values to all that is trained, as if by training."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))


@pytest.mark.parametrize("architecture, changes, config", CASES.values(), ids=CASES.keys())
def test_what_peft_saved_gives_the_same_outputs_here(
    base: Any, tmp_path: Path, architecture: str, changes: dict[str, Any], config: dict[str, Any]
) -> None:
    folder = base(architecture, **changes)
    reference = peft.get_peft_model(theirs(architecture, folder), peft.LoraConfig(**config)).eval()
    plain = output(ours(architecture, folder))
    scramble(reference)
    reference.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(ours(architecture, folder), tmp_path)
    expected = output(reference, torchs=True)
    assert np.abs(plain - expected).max() > 1e-2
    np.testing.assert_allclose(output(model), expected, **TIGHT)
    merged = model.merge_and_unload()
    np.testing.assert_allclose(output(merged), expected, **TIGHT)
    for name, values in reference.merge_and_unload().state_dict().items():
        unused = name == "cls.predictions.bias" and changes  # of an untied decoder, whose own bias counts
        if name in merged.state_dict() and not unused:
            np.testing.assert_allclose(merged.state_dict()[name], values.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture, changes, config", CASES.values(), ids=CASES.keys())
def test_what_is_saved_here_gives_the_same_outputs_in_peft(
    base: Any, tmp_path: Path, architecture: str, changes: dict[str, Any], config: dict[str, Any]
) -> None:
    folder = base(architecture, **changes)
    model = get_peft_model(ours(architecture, folder), LoraConfig(**config))
    rng = np.random.default_rng(4)
    for p in model.trained().values():
        p.assign(p.numpy() + 0.1 * rng.standard_normal(p.shape))
    model.save_pretrained(tmp_path)
    expected = output(model)
    assert np.abs(output(ours(architecture, folder)) - expected).max() > 1e-2
    reference = peft.PeftModel.from_pretrained(theirs(architecture, folder), tmp_path).eval()
    np.testing.assert_allclose(output(reference, torchs=True), expected, **TIGHT)


CLASSES = np.array([2, 0, 1])


@pytest.mark.parametrize("case, labels", [
    ("defaults", LABELS), ("all biases", LABELS), ("texts", CLASSES), ("texts, all linear layers and biases", CLASSES),
    ("tokens", np.where(LABELS < 0, LABELS, LABELS % 3)),
])  # fmt: skip
def test_training_takes_the_same_way(base: Any, tmp_path: Path, case: str, labels: np.ndarray) -> None:
    """Losses, gradients and what is trained, over steps of AdamW from the same adapter."""
    import torch

    architecture, changes, config = CASES[case]
    folder = base(architecture, **changes)
    reference = peft.get_peft_model(theirs(architecture, folder), peft.LoraConfig(**config)).eval()
    scramble(reference)
    reference.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(ours(architecture, folder), tmp_path, is_trainable=True)
    model.train()
    trained = [p for p in reference.parameters() if p.requires_grad]
    assert model.get_nb_trainable_parameters()[0] == sum(p.numel() for p in trained)
    their_optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.01)
    optimizer = mb.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(4):
        their_optimizer.zero_grad()
        their_loss = reference(torch.from_numpy(IDS), labels=torch.from_numpy(labels)).loss
        their_loss.backward()
        their_optimizer.step()
        optimizer.zero_grad()
        loss = model(IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(their_loss.item(), abs=2e-5)
    model.eval()
    np.testing.assert_allclose(output(model), output(reference, torchs=True), rtol=0, atol=5e-3)
