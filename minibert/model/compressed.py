"""How config.json says that weights are in int8, as the library compressed-tensors writes it and transformers reads."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from minibert.errors import UserError
from minibert.model.matching import ENCODER

KEY, METHOD, FORMAT = "quantization_config", "compressed-tensors", "int-quantized"
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}


def quantization_config(int8: Sequence[str]) -> dict[str, Any]:
    """Of a model in which the linear layers of these names are in int8: in the encoder alone, or with a head, too."""
    ends = [f"re:(.*\\.)?{re.escape(ENCODER.sub('', name))}$" for name in int8]
    group = {"targets": ends, "weights": WEIGHTS, "input_activations": ACTIVATIONS}
    return {
        "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": [],
        "config_groups": {"group_0": group},
    }  # fmt: skip


def check_quantization(said: Any) -> None:
    """Raises UserError where a quantization_config is of weights that are not read here, or of other arithmetic."""
    if not said:
        return
    try:
        groups = list(said["config_groups"].values())
        same = (said["quant_method"], said["format"]) == (METHOD, FORMAT) and bool(groups)
        for group in groups:
            same &= _holds(group["weights"], WEIGHTS) and _holds(group["input_activations"], ACTIVATIONS)
    except (AttributeError, KeyError, TypeError):
        same = False
    if not same:
        kind = said.get("quant_method") if isinstance(said, Mapping) else said
        raise UserError(
            f"config: {KEY} of {reprlib.repr(kind)} is not supported: expected {METHOD}, {FORMAT!r}, int8 by channel, "
            "inputs by token with a zero point; take the model that it was made of, and minibert quantize"
        )


def _holds(given: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(given.get(key) == value for key, value in wanted.items())
