"""Which modules of a model are tuned, and which are trained whole: names are matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from minibert.errors import UserError
from minibert.model.matching import DECODER
from minibert.model.nn import Embedding, Linear, Module
from minibert.tuning.config import HEADS, AdaLoraConfig, LoraConfig

ALL_LINEAR = "all-linear"
NUMBERED = r".*?\.[^.]*\.(\d+)\."  # the first number in a name is its layer's


def named_modules(module: Module, prefix: str = "") -> Iterator[tuple[str, Module]]:
    """Every module within, by its full name."""
    for name, child in module.named_children():
        if isinstance(child, Module):
            yield prefix + name, child
            yield from named_modules(child, f"{prefix}{name}.")


def ends_with(name: str, ending: str) -> bool:
    """Whether a name is `ending`, or ends with it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def by_pattern(pattern: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """The value of the first key, a regex, that the end of a name matches."""
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", name)), otherwise)


def trained_whole(model: Module, config: LoraConfig, strict: bool) -> list[str]:
    """Names of the modules that are trained whole: modules_to_save, and the task's head.

    Raises UserError where the model has no such head; for tied weights; and, if `strict`, for a name that is nowhere.
    """
    names = [name for name, _ in named_modules(model)]
    heads = config.heads
    if heads and not any(ends_with(name, head) for name in names for head in heads):
        raise UserError(
            f"task_type {config.task_type}: expected a model with a head named {' or '.join(heads)}, got "
            f"{type(model).__name__}: take the model of that task, or leave task_type out"
        )
    wanted = {*(config.modules_to_save or ()), *heads}
    found = [name for name in names if any(ends_with(name, one) for one in wanted)]
    absent = sorted(w for w in wanted if not any(ends_with(n, w) for n in names) and w not in sum(HEADS.values(), ()))
    if absent and strict:
        raise UserError(f"modules_to_save: {type(model).__name__} has no module {absent[0]!r}")
    _refuse_tied(model, found)
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _refuse_tied(model: Any, names: Iterable[str]) -> None:
    """A decoder that is the word embedding would be trained, and merged, on both sides of the model."""
    if not (model.has_decoder and model.config.tie_word_embeddings):
        return
    for name in names:
        holds = name.split(".")[-1] in ("word_embeddings", "embeddings", model.base_model_prefix)
        if holds or name in ("cls", "cls.predictions", "generator_lm_head"):
            raise UserError(
                f"modules_to_save: {name} holds the word embedding, which is also the decoder: make the model with "
                "tie_word_embeddings=False to train one of them alone"
            )


def targets(model: Any, config: LoraConfig, whole: Iterable[str], strict: bool) -> dict[str, Any]:
    """The linear layers and embeddings that are tuned, by name; nothing in the modules that are trained `whole` is.

    Raises UserError where there is none, where something else is named, an embedding with AdaLoRA, and, if `strict`,
    for a name that is nowhere.
    """
    chosen = {
        name: module
        for name, module in named_modules(model)
        if not any(name == one or name.startswith(f"{one}.") for one in whole) and _is_target(name, module, config)
    }
    kinds = Linear if isinstance(config, AdaLoraConfig) else Linear | Embedding
    decoder = DECODER.removesuffix(".weight")  # a table here, whose rows nobody looks up
    other = [name for name, module in chosen.items() if not isinstance(module, kinds) or name == decoder]
    if other:
        got = type(chosen[other[0]]).__name__
        raise UserError(f"target_modules: {config.peft_type} has no update of {other[0]}, which is {got}")
    if not chosen:
        raise UserError(f"target_modules: {_said(config.target_modules)} is no linear layer of {type(model).__name__}: "
                        f"it has {', '.join(_endings(model))}")  # fmt: skip
    for key in (*config.rank_pattern, *config.alpha_pattern) if strict else ():
        if not any(by_pattern({key: True}, name, False) for name in chosen):
            raise UserError(f"rank_pattern or alpha_pattern: {key!r} is none of the target modules")
    if strict and not isinstance(config.target_modules, str):
        for ending in config.target_modules:
            if not any(ends_with(name, ending) for name, _ in named_modules(model)):
                raise UserError(
                    f"target_modules: {type(model).__name__} has no {ending!r}: it has {', '.join(_endings(model))}"
                )
    return chosen


def _said(given: Any) -> str:
    return repr(given) if isinstance(given, str) else ", ".join(map(repr, given))


def _endings(model: Module) -> list[str]:
    """What its linear layers are called, for a message."""
    return sorted({name.split(".")[-1] for name, module in named_modules(model) if isinstance(module, Linear)})


def _is_target(name: str, module: Module, config: LoraConfig) -> bool:
    if config.exclude_modules and _matches(name, config.exclude_modules):
        return False
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        return isinstance(module, Linear) and not any(
            ends_with(name, head) for heads in HEADS.values() for head in heads
        )
    return _matches(name, config.target_modules) and _in_layers(name, config)


def _matches(name: str, wanted: Any) -> bool:
    """Whether a regex matches a whole name, or one of several ends is its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(ends_with(name, ending) for ending in wanted)


def _in_layers(name: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    patterns = config.layers_pattern or (None,)
    for one in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(NUMBERED if one is None else rf"(?:^|.*?\.){one}\.(\d+)\.", name)
        if found:
            return int(found[1]) in config.layers_to_transform
    return False
