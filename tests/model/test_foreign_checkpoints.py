"""Checkpoints as people have them, mutilated or of another origin: outputs and reports against transformers'.

Modelled on public reports, among them huggingface/transformers 217 (prefix), 6882 (position_ids), 11809 and 29554
(gamma, beta), 19999 (the decoder's bias), 45007 (a dropout of 0), pytorch/pytorch 46063 and 101107 (wrappers),
neulab/awesome-align 55 (tied by the config, not by the file), mesnico/TERN 1 (layers left over),
stanford-futuredata/ColBERT 106 (another vocabulary), ml-explore/mlx 743 (no metadata).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from minibert.model.checkpoint import write_arrays
from minibert.model.matching import BIAS, DECODER, DECODER_BIAS, WORDS

pytestmark = pytest.mark.parity

CONFIG: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 20, "max_position_embeddings": 16, "hidden_act": "gelu", "type_vocab_size": 2,
    "hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0, "pad_token_id": 0,
}  # fmt: skip
IDS = np.random.default_rng(1).integers(1, CONFIG["vocab_size"], (2, 7))
MASK = np.array([[1] * 7, [1] * 4 + [0] * 3])
TYPES = np.array([[0, 0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])

Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays], Arrays]


def plain(arrays: Arrays) -> Arrays:
    return arrays


def renamed(old: str, new: str) -> Change:
    return lambda arrays: {name.replace(old, new): array for name, array in arrays.items()}


def without(*parts: str) -> Change:
    return lambda arrays: {name: a for name, a in arrays.items() if not any(part in name for part in parts)}


def with_more(**more: Callable[[Arrays], np.ndarray]) -> Change:
    return lambda arrays: {**arrays, **{name: make(arrays) for name, make in more.items()}}


def of_dtype(dtype: str) -> Change:
    return lambda arrays: {name: array.astype(dtype) for name, array in arrays.items()}


def bfloat16(arrays: Arrays) -> Arrays:
    import ml_dtypes

    return {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}


def another(shape: tuple[int, ...]) -> Callable[[Arrays], np.ndarray]:
    return lambda arrays: np.random.default_rng(5).normal(0, 0.15, shape).astype(np.float32)


V, C = CONFIG["vocab_size"], CONFIG["hidden_size"]
OWN_DECODER, OWN_BIAS = {DECODER: another((V, C))}, {DECODER_BIAS: another((V,))}
POSITIONS = {"bert.embeddings.position_ids": lambda arrays: np.arange(16)[None]}


@dataclass(frozen=True)
class Case:
    """A file, made of a whole BertForPreTraining's, and a model that loads it."""

    architecture: str
    change: Change = plain
    config: dict[str, Any] = field(default_factory=dict)  # what config.json says otherwise
    options: dict[str, Any] = field(default_factory=dict)  # of from_pretrained
    instead: Change | None = None  # what transformers loads, where it does not know the names
    outputs: tuple[str, ...] | None = None  # those that depend on no newly drawn weight; None: all
    states: int | None = None  # so many of the hidden states
    shards: int = 0
    metadata: bool = True


ALL = {
    "BertModel": ("last_hidden_state", "pooler_output"),
    "BertForMaskedLM": ("logits",),
    "BertForPreTraining": ("prediction_logits", "seq_relationship_logits"),
}
CASES = {
    "as transformers writes it": Case("BertForPreTraining"),
    "a bare encoder": Case("BertModel", lambda arrays: renamed("bert.", "")(without("cls.")(arrays))),
    "a bare encoder under a head": Case(
        "BertForMaskedLM", lambda a: renamed("bert.", "")(without("cls.", "pooler")(a)), outputs=("hidden_states",)
    ),
    "bare names beside a head": Case("BertForPreTraining", renamed("bert.", "")),
    "heads that an encoder has no use for": Case("BertModel"),
    "a pooler and a head that MLM has no use for": Case("BertForMaskedLM"),
    "a classifier's file": Case(
        "BertModel",
        with_more(**{"classifier.weight": another((3, C)), "classifier.bias": another((3,))}),
        {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
    ),
    "no pooler": Case("BertModel", without("pooler", "cls."), outputs=("last_hidden_state",)),
    "no pooler, and none wanted": Case(
        "BertModel", without("pooler", "cls."), options={"add_pooling_layer": False}, outputs=("last_hidden_state",)
    ),
    "gamma and beta": Case(
        "BertForPreTraining",
        lambda a: renamed("LayerNorm.weight", "LayerNorm.gamma")(renamed("LayerNorm.bias", "LayerNorm.beta")(a)),
    ),
    "position_ids": Case("BertForPreTraining", with_more(**POSITIONS)),
    "DataParallel's module.": Case(
        "BertForPreTraining", lambda a: {f"module.{n}": x for n, x in a.items()}, instead=plain
    ),
    "torch.compile's _orig_mod.": Case(
        "BertForPreTraining", lambda a: {f"_orig_mod.{n}": x for n, x in a.items()}, instead=plain
    ),
    "a repeated decoder": Case(
        "BertForPreTraining", with_more(**{DECODER: lambda a: a[WORDS], DECODER_BIAS: lambda a: a[BIAS]})
    ),
    "only the decoder's bias": Case("BertForPreTraining", renamed(BIAS, DECODER_BIAS)),
    "only the decoder's weight": Case("BertForPreTraining", renamed(WORDS, DECODER)),
    "tied, and a decoder of its own": Case("BertForMaskedLM", with_more(**OWN_DECODER)),
    "tied, and a decoder and bias of its own": Case("BertForPreTraining", with_more(**OWN_DECODER, **OWN_BIAS)),
    "tied, and a bias of its own": Case("BertForMaskedLM", with_more(**OWN_BIAS)),
    "untied": Case("BertForPreTraining", with_more(**OWN_DECODER, **OWN_BIAS), {"tie_word_embeddings": False}),
    "untied, with one bias, as transformers 4 wrote it": Case(
        "BertForPreTraining", with_more(**OWN_DECODER), {"tie_word_embeddings": False},
        instead=with_more(**OWN_DECODER, **{DECODER_BIAS: lambda a: a[BIAS]}),
    ),
    "more layers than the config has": Case("BertForPreTraining", config={"num_hidden_layers": 1}),
    "fewer layers than the config has": Case(
        "BertModel", config={"num_hidden_layers": 3}, outputs=("hidden_states",), states=3
    ),
    "a bias lost, which begins at 0": Case("BertModel", without("layer.1.output.dense.bias")),
    "float16": Case("BertForPreTraining", of_dtype("f2"), {"torch_dtype": "float16"}),
    "bfloat16": Case("BertForPreTraining", bfloat16, {"dtype": "bfloat16"}),
    "float64": Case("BertForPreTraining", of_dtype("f8"), {"dtype": "float64"}),
    "shards": Case("BertForPreTraining", shards=3),
    "no metadata": Case("BertForPreTraining", metadata=False),
    "another vocabulary": Case(
        "BertModel", config={"vocab_size": V + 2}, options={"ignore_mismatched_sizes": True}, outputs=()
    ),
    "no padding id, and keys of all kinds": Case(
        "BertForPreTraining",
        config={
            "pad_token_id": None, "emb_size": 4, "tokenizer_class": "BertTokenizer", "notes": [1], "use_cache": False,
            "chunk_size_feed_forward": 0, "pruned_heads": {}, "output_past": True, "is_encoder_decoder": True,
        },
    ),
    **{
        act: Case("BertForPreTraining", config={"hidden_act": act})
        for act in ("gelu_python", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_new", "tanh", "relu")
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def quiet_transformers() -> Iterator[None]:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)  # its pool would spin for the same cores
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def whole() -> Arrays:
    """A BertForPreTraining's weights, none of them at a value that would hide a mistake."""
    rng = np.random.default_rng(2)
    model = mb.BertForPreTraining(mb.BertConfig.from_dict(CONFIG), backend="numpy")
    found = {
        n: rng.normal(1.0 if n.endswith("Norm.weight") else 0.0, 0.15, a.shape) for n, a in model.state_dict().items()
    }
    return {name: array.astype(np.float32) for name, array in found.items()}


def write(folder: Path, case: Case, arrays: Arrays) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **case.config}))
    metadata = {"format": "pt"} if case.metadata else {}
    if not case.shards:
        write_arrays(folder / "model.safetensors", arrays, metadata)
        return folder
    where = {name: f"model-{i % case.shards}.safetensors" for i, name in enumerate(arrays)}
    for file in set(where.values()):
        write_arrays(folder / file, {n: a for n, a in arrays.items() if where[n] == file}, metadata)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def theirs(folder: Path, case: Case) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    kind = getattr(transformers, case.architecture)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True, **case.options}
    model, info = kind.from_pretrained(folder, **options)
    return model.eval(), info


def outputs(model: Any, case: Case, as_input: Callable[[np.ndarray], Any]) -> dict[str, np.ndarray]:
    """What the case compares, on real positions."""
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": TYPES}
    out = model(**{name: as_input(values) for name, values in inputs.items()}, output_hidden_states=True)
    found = {}
    for name in ALL[case.architecture] if case.outputs is None else case.outputs:
        value = getattr(out, name)
        parts = value[: case.states] if name == "hidden_states" else (value,)
        for i, part in enumerate(parts):
            array = part.numpy() if isinstance(part, mb.Tensor) else part.detach().numpy()
            found[f"{name} {i}"] = array[MASK == 1] if array.ndim == 3 else array
    return found


def close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=0, atol=1e-5, err_msg=name)


def not_used(arrays: Arrays) -> set[str]:
    """A second bias that differs: transformers reads it, and computes nothing with it."""
    return (
        {BIAS} if BIAS in arrays and not np.array_equal(arrays.get(DECODER_BIAS, arrays[BIAS]), arrays[BIAS]) else set()
    )


@pytest.mark.parametrize("name", CASES)
def test_a_foreign_checkpoint_loads_as_in_transformers(name: str, whole: Arrays, tmp_path: Path) -> None:
    """Its outputs, its report, and both again after it was saved here."""
    import torch

    case = CASES[name]
    arrays = case.change(whole)
    folder = write(tmp_path / "file", case, arrays)
    plainer = folder if case.instead is None else write(tmp_path / "plain", case, case.instead(whole))
    reference, expected_info = theirs(plainer, case)
    expected = outputs(reference, case, torch.from_numpy)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model, info = getattr(mb, case.architecture).from_pretrained(
            folder, backend="numpy", output_loading_info=True, **case.options
        )
    close(outputs(model, case, np.asarray), expected)

    expected_info["missing_keys"] &= model.state_dict().keys()  # of two tied names, there are both
    expected_info["unexpected_keys"] |= not_used(arrays)
    assert info == {
        key: expected_info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    }
    said = " ".join(str(each.message) for each in told)
    assert ("missing: " in said, "unexpected: " in said) == (bool(info["missing_keys"]), bool(info["unexpected_keys"]))
    assert ("of another shape: " in said) == bool(info["mismatched_keys"])
    untied = case.config.get("tie_word_embeddings", True) and not model.config.tie_word_embeddings
    assert untied == ("not tied" in said) == name.startswith("tied, and a decoder")
    assert "\n" not in said and len(said) < 1500

    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    again, info = theirs(saved, case)
    assert not any(info.values()), info
    close(outputs(again, case, torch.from_numpy), expected)
    kept = {**CONFIG, **case.config, "architectures": [case.architecture]}
    kept |= {key: "float32" for key in ("dtype", "torch_dtype") if key in case.config}
    kept |= {"tie_word_embeddings": model.config.tie_word_embeddings}
    assert kept.items() <= json.loads((saved / "config.json").read_text()).items()
