"""The sizes and habits of a BERT, under the names that Hugging Face's config.json gives them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, ClassVar, Self

from minibert.errors import UserError, warn
from minibert.model.compressed import KEY, check_quantization

# transformers' names of the two GELUs, by erf and by tanh, each with the `approximate` of the op that computes it. (Its
# gelu_10 is another function: it is cut off at 10.)
GELU = {
    "gelu": "none", "gelu_python": "none", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh", "gelu_python_tanh": "tanh",
}  # fmt: skip
ACTIVATIONS = (*GELU, "relu", "tanh")

# Keys that would change the math: this model knows the one value each, and refuses others. What is empty (false, null)
# asks for nothing, except of the positions: None is no position at all to some versions of transformers.
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "per_layer_config": {},
}

# Fields that a config.json of transformers' holds only where they say something, and may hold as null.
QUIET: dict[str, Any] = {
    "output_hidden_states": False, "output_attentions": False, "return_dict": True, "problem_type": None,
    "id2label": {},
}  # fmt: skip
# What the labels of a BertForSequenceClassification are: numbers, one class of several, or any of several.
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
MOST_LABELS = 1_000_000  # that a config names by their number alone
NULLABLE = {"pad_token_id": int, "classifier_dropout": float, "problem_type": str}  # fields that may be None


@dataclass(frozen=True)
class BertConfig:
    """What a BERT is made of; the defaults are BERT base, uncased (Devlin et al. 2018).

    Raises UserError where a value is of the wrong type, out of range, or does not fit another.
    """

    model_type: ClassVar[str] = "bert"

    vocab_size: int = 30522  # rows of the word embedding, which the MLM decoder shares
    hidden_size: int = 768  # C, the width of every token between the layers
    num_hidden_layers: int = 12
    num_attention_heads: int = 12  # H; a head is hidden_size / H wide, 64 in every published BERT but the MiniLMs
    intermediate_size: int = 3072  # the width inside the feed-forward half of a layer, by habit 4 C
    hidden_act: str = "gelu"  # by erf, as BERT was trained; gelu_new is the approximation by tanh
    hidden_dropout_prob: float = 0.1  # after the embeddings and before each residual sum
    attention_probs_dropout_prob: float = 0.1  # on the weights that softmax gives
    max_position_embeddings: int = 512  # positions are learned: a longer sequence has no embedding
    type_vocab_size: int = 2  # first and second sentence of a pair
    initializer_range: float = 0.02  # standard deviation of new weights
    layer_norm_eps: float = 1e-12  # beside a variance: only a row of equal values needs it
    pad_token_id: int | None = 0  # fills the (B, T) input; this id's row is not trained through the embedding. Or none
    tie_word_embeddings: bool = True  # the decoder is the word embedding, transposed
    output_hidden_states: bool = False  # what a call returns where it does not say
    output_attentions: bool = False
    return_dict: bool = True  # an output with names; if not, a tuple
    classifier_dropout: float | None = None  # before a head's classifier; None: hidden_dropout_prob
    problem_type: str | None = None  # one of PROBLEM_TYPES; None: what the first labels say
    id2label: Mapping[int, str] = field(default_factory=dict, hash=False)  # names of a head's outputs; {}: two without
    # What a config.json holds beside, as it stands there: nothing here reads it, save_pretrained writes it back. It is
    # no part of what makes two configs equal. A keyword that is misspelt in Python stays a TypeError.
    others: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.pad_token_id == -1:  # as some write it where there is no padding
            object.__setattr__(self, "pad_token_id", None)
        object.__setattr__(self, "id2label", _names(self.id2label))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in ("others", "id2label") and not (f.name in NULLABLE and value is None):
                kind = NULLABLE.get(f.name, type(f.default))
                object.__setattr__(self, f.name, _of_type(f.name, value, kind))
        misplaced = self.others.keys() & vars(self).keys() - {"others"}
        _require(not misplaced, "others", "what no field holds", ", ".join(misplaced))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "type_vocab_size"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            _require(0.0 <= (getattr(self, name) or 0.0) < 1.0, name, "a probability in [0, 1)", getattr(self, name))
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            _require(value >= 0.0 and math.isfinite(value), name, "a finite number of 0 or more", value)
        kinds = f"None or one of {', '.join(PROBLEM_TYPES)}"
        _require(self.problem_type in (None, *PROBLEM_TYPES), "problem_type", kinds, self.problem_type)
        _require(self.hidden_act in ACTIVATIONS, "hidden_act", f"one of {', '.join(ACTIVATIONS)}", self.hidden_act)
        heads = f"a multiple of num_attention_heads ({self.num_attention_heads})"
        _require(self.hidden_size % self.num_attention_heads == 0, "hidden_size", heads, self.hidden_size)
        padding = self.pad_token_id
        fits = padding is None or 0 <= padding < self.vocab_size
        _require(fits, "pad_token_id", f"None, or an id of 0 or more and below vocab_size ({self.vocab_size})", padding)

    def numbers(self) -> int:
        """How many numbers the tables and the matrices of the layers hold: most of the model."""
        layer = self.hidden_size * (4 * self.hidden_size + 2 * self.intermediate_size)
        rows = self.vocab_size + self.max_position_embeddings + self.type_vocab_size
        return self.num_hidden_layers * layer + rows * self.embedding_size

    @property
    def embedding_size(self) -> int:
        """The width of the embeddings."""
        return self.hidden_size

    @property
    def num_labels(self) -> int:
        """Outputs of a head that classifies; 2 where nothing is said."""
        return len(self.id2label) or 2

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each label by its name; of two labels of one name, the last's."""
        return {name: number for number, name in self.id2label.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that a config.json holds. Keys that do not bear on the math are kept in `others`.

        A warning names a key that looks like a misspelt one of this model's, and the code that another model brings
        along. Raises UserError for a value of the wrong type, and for one that this model cannot follow.
        """
        given, values = values, with_labels(values)
        own = {f.name for f in fields(cls)} - {"others"}
        kind = cls.model_type.upper()
        for key, only in {"model_type": cls.model_type, **ONLY}.items():
            value = values.get(key, only)
            if key == "model_type" and value is None:
                continue
            if value != only and (value or isinstance(only, str)):
                raise UserError(
                    f"config: {key} {reprlib.repr(value)} is not supported: this is {kind} with {key} {only!r} only"
                )
        check_quantization(values.get(KEY))
        for key in [key for key in values if key not in own]:
            near = get_close_matches(key, own - values.keys(), n=1, cutoff=0.85)
            if near:
                warn(f"config: nothing reads {key!r}: did you mean {near[0]!r}?")
        if values.get("auto_map"):
            warn(
                f"config: auto_map names code of the checkpoint's own; it is not run, and this is {kind}, which may "
                "differ"
            )
        others = {key: value for key, value in given.items() if key not in own | {"model_type", "label2id"}}
        unsaid = {key for key in QUIET if values.get(key) is None}  # null is no there
        return cls(**{key: value for key, value in values.items() if key in own - unsaid}, others=others)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds for this model, as transformers' BertConfig reads it."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "others"}
        said = {key: value for key, value in own.items() if key not in QUIET or value != QUIET[key]}
        if self.id2label:  # JSON's keys are strings
            said["id2label"] = {str(number): name for number, name in self.id2label.items()}
            said["label2id"] = self.label2id
        if "num_labels" in self.others:  # as some write it besides
            said["num_labels"] = self.num_labels
        return {**self.others, "model_type": self.model_type, **said}


@dataclass(frozen=True)
class ElectraConfig(BertConfig):
    """What an ELECTRA is made of; the defaults are ELECTRA small, as in transformers (Clark et al. 2020, table 6)."""

    model_type: ClassVar[str] = "electra"

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    embedding_size: int = 128  # where it is not hidden_size, embeddings_project is between

    @classmethod
    def like(cls, config: BertConfig) -> Self:
        """One of the sizes of a BERT, its embeddings as wide as its layers."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(BertConfig)}, embedding_size=config.hidden_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.embedding_size >= 1, "embedding_size", "1 or more", self.embedding_size)


def config_from(values: Mapping[str, Any]) -> BertConfig:
    """The config that a config.json holds, of the model that its model_type names. Raises as `BertConfig.from_dict`."""
    kind = ElectraConfig if values.get("model_type") == ElectraConfig.model_type else BertConfig
    return kind.from_dict(values)


def with_labels(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` of a config with its labels in `id2label` alone, whichever of transformers' names it gave them under.

    `num_labels` names them LABEL_0, LABEL_1 ... as there, where `id2label` does not name as many.
    """
    given = dict(values)
    count, numbers = given.pop("num_labels", None), given.pop("label2id", None)
    if not given.get("id2label") and isinstance(numbers, Mapping) and numbers:
        given["id2label"] = {number: name for name, number in numbers.items()}
    if count is not None:
        possible = isinstance(count, int) and 0 < count <= MOST_LABELS
        _require(possible, "num_labels", f"a whole number from 1 to {MOST_LABELS:,}", count)
        if len(given.get("id2label") or ()) != count:
            given["id2label"] = {number: f"LABEL_{number}" for number in range(count)}
    return given


def _names(given: Any) -> dict[int, str]:
    """Labels by number, in the order of the numbers; a list names them from 0 on."""
    if isinstance(given, list | tuple):
        given = dict(enumerate(given))
    expected = "a mapping from whole numbers to names"
    _require(given is None or isinstance(given, Mapping), "id2label", expected, given)
    try:
        return {number: str(name) for number, name in sorted((int(key), name) for key, name in (given or {}).items())}
    except (TypeError, ValueError):
        raise UserError(f"config: expected id2label to be {expected}, got {reprlib.repr(given)}") from None


def _of_type(name: str, value: Any, expected: type) -> Any:
    """`value` as the type of the field's default; JSON writes a whole number where a float is meant."""
    kinds = {int: Integral, float: Real}.get(expected, expected)  # NumPy's numbers are numbers too
    if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
        raise UserError(
            f"config: expected {name} to be {expected.__name__}, got {type(value).__name__} {reprlib.repr(value)}"
        )
    return expected(value)


def _require(holds: bool, name: str, expected: str, value: Any) -> None:
    if not holds:
        raise UserError(f"config: expected {name} to be {expected}, got {reprlib.repr(value)}")


def _miniature(layers: int, hidden: int) -> BertConfig:
    return BertConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
    )


# Google's BERT miniatures: Turc et al., "Well-Read Students Learn Better" (2019); but minilm is MiniLM-L6-H384 (Wang et
# al., "MiniLM: Deep Self-Attention Distillation", 2020), whose heads are 32 wide.
NAMED: dict[str, BertConfig] = {
    "tiny": _miniature(2, 128),
    "mini": _miniature(4, 256),
    "minilm": BertConfig(num_hidden_layers=6, hidden_size=384, num_attention_heads=12, intermediate_size=1536),
    "small": _miniature(4, 512),
    "medium": _miniature(8, 512),
    "base": _miniature(12, 768),
}
