"""The sizes and habits of a BERT, under the names that Hugging Face's config.json gives them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from minibert.errors import UserError

# gelu_new and gelu_pytorch_tanh are two names of one function: the approximation by tanh.
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

# Keys of a config.json that describe the file, another head or the way of running it, but not this model's math.
IGNORED = frozenset(
    """
    _name_or_path _num_labels architectures attn_implementation bos_token_id chunk_size_feed_forward classifier_dropout
    cls_token_id directionality dtype eos_token_id finetuning_task gradient_checkpointing id2label label2id language
    mask_token_id model_max_length num_labels output_attentions output_hidden_states output_past pooler_fc_size
    pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type problem_type return_dict
    sep_token_id torch_dtype torchscript transformers_version unk_token_id use_cache
    """.split()  # noqa: SIM905 - one name a line would be a page
)

# Keys that would change the math: this model knows the one value each, and says so where another comes.
ONLY = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}


@dataclass(frozen=True)
class BertConfig:
    """What a BERT is made of; the defaults are BERT base, uncased (Devlin et al. 2018).

    Raises UserError where a value is of the wrong type, out of range, or does not fit another.
    """

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
    pad_token_id: int = 0  # fills the (B, T) input; the row of this id is not trained through the embedding
    tie_word_embeddings: bool = True  # the decoder is the word embedding, transposed

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _of_type(f.name, getattr(self, f.name), type(f.default)))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "max_position_embeddings", "type_vocab_size"):  # fmt: skip
            _require(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            _require(0.0 <= getattr(self, name) < 1.0, name, "a probability in [0, 1)", getattr(self, name))
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            _require(value >= 0.0 and math.isfinite(value), name, "a finite number of 0 or more", value)
        _require(self.hidden_act in ACTIVATIONS, "hidden_act", f"one of {', '.join(ACTIVATIONS)}", self.hidden_act)
        heads = f"a multiple of num_attention_heads ({self.num_attention_heads})"
        _require(self.hidden_size % self.num_attention_heads == 0, "hidden_size", heads, self.hidden_size)
        _require(0 <= self.pad_token_id < self.vocab_size, "pad_token_id", "an id below vocab_size", self.pad_token_id)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BertConfig:
        """The config that a config.json holds. Keys of Hugging Face's that do not bear on the math are passed over.

        Raises UserError for a key that is not known and for a value that this model cannot follow.
        """
        own = {f.name for f in fields(cls)}
        for key, value in values.items():
            if key in ONLY and not (value == ONLY[key] and type(value) is type(ONLY[key])):
                raise UserError(f"config: {key} {value!r} is not supported: this is BERT with {key} {ONLY[key]!r} only")
            if key not in own and key not in IGNORED and key not in ONLY:
                near = get_close_matches(key, [*own, *IGNORED, *ONLY], n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(f.name for f in fields(cls))}"
                raise UserError(f"config: unknown key {key!r}: {hint}")
        return cls(**{key: value for key, value in values.items() if key in own})

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds for this model, as transformers' BertConfig reads it."""
        return {"model_type": "bert", **asdict(self)}


def _of_type(name: str, value: Any, expected: type) -> Any:
    """`value` as the type of the field's default; JSON writes a whole number where a float is meant."""
    kinds = {int: Integral, float: Real}.get(expected, expected)  # NumPy's numbers are numbers too
    if not isinstance(value, kinds) or (isinstance(value, bool) and expected is not bool):
        raise UserError(f"config: expected {name} to be {expected.__name__}, got {type(value).__name__} {value!r}")
    return expected(value)


def _require(holds: bool, name: str, expected: str, value: Any) -> None:
    if not holds:
        raise UserError(f"config: expected {name} to be {expected}, got {value!r}")


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
