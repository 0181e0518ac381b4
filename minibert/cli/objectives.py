"""What `minibert pretrain` makes for each --objective: the model, its trainer, and words for an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from minibert.backends import Backend
from minibert.cli.running import require_memory, say
from minibert.errors import UserError
from minibert.model.bert import BertForMaskedLM, BertForPreTraining
from minibert.model.checkpoint import read_config
from minibert.model.config import NAMED, BertConfig, ElectraConfig
from minibert.model.electra_pair import GENERATOR, ElectraPair, generator_of
from minibert.train.config import TrainingConfig
from minibert.train.loop import Record
from minibert.train.memory import Memory, Passes, parameters_of, predict
from minibert.train.replaced_tokens import ReplacedTokenTrainer
from minibert.train.trainer import Data, Trainer


def refuse_generator_options(training: TrainingConfig, given: Collection[str], config: str) -> None:
    """Raise UserError for settings of a generator where there is none, or one that has its size."""
    for name in ("generator_size", "rtd_weight"):
        if training.objective != "rtd" and name in given:
            raise UserError(f"--{name.replace('_', '-')}: expected with --objective rtd, which trains a generator")
    if "generator_size" in given and (Path(config) / GENERATOR).is_dir() and config not in NAMED:
        raise UserError(f"--generator-size: the generator in {Path(config) / GENERATOR} has its size: leave it out")


def config_for(training: TrainingConfig, folder: Path | None, size: str) -> BertConfig:
    """Of a named size, or as a folder has it. Raises UserError where that is another kind of model."""
    wanted = ElectraConfig if training.objective == "rtd" else BertConfig
    if folder is None:
        return ElectraConfig.like(NAMED[size]) if training.objective == "rtd" else NAMED[size]
    config = read_config(folder)
    if config.model_type != wanted.model_type:
        other = "mlm" if training.objective == "rtd" else "rtd"
        raise UserError(
            f"--config {folder} is of model_type {config.model_type!r}, expected {wanted.model_type!r}: give "
            f"--objective {other}, or another folder"
        )
    return config


def refuse_too_large(
    config: BertConfig, training: TrainingConfig, place: Backend, dtype: str, folder: Path | None
) -> None:
    """Raise UserError where the model and a step of its training would not find room in memory: before there is one."""

    def predicted(passes: Passes) -> Memory | None:
        if not isinstance(config, ElectraConfig):
            return predict(config, passes, place.name, dtype, parameters_of(config))
        other = _generator(config, training, folder)
        halves = [predict(each, passes, place.name, dtype, parameters_of(each)) for each in (config, other)]
        return None if halves[0] is None or halves[1] is None else halves[0] + halves[1]

    share = training.mlm_probability * training.tokens_per_batch
    passes = Passes(
        training.tokens_per_batch, training.gradient_accumulation_steps, round(share), training.checkpoint_activations,
        saving=training.save_steps < training.max_steps, graphed=training.graph,
    )  # fmt: skip

    def flags(found: Passes) -> str:
        recompute = " --checkpoint-activations" if found.recompute else ""
        return f"--tokens-per-batch {found.tokens} --gradient-accumulation-steps {found.accumulated}{recompute}"

    require_memory(place, predicted, passes, training.max_seq_length, flags)


def untrained(
    config: BertConfig, training: TrainingConfig, place: Backend, dtype: str, folder: Path | None
) -> BertForMaskedLM | ElectraPair:
    """A model of a config; or a pair, whose generator's config the folder may hold."""
    if not isinstance(config, ElectraConfig):
        return _masked_lm(training)(config, place, dtype, training.seed)
    return ElectraPair(config, _generator(config, training, folder), place, dtype, training.seed)


def _generator(config: ElectraConfig, training: TrainingConfig, folder: Path | None) -> BertConfig:
    beside = folder / GENERATOR if folder is not None and (folder / GENERATOR).is_dir() else None
    return generator_of(config, training.generator_size) if beside is None else read_config(beside)


def pretrained(folder: Path, training: TrainingConfig, place: Backend, dtype: str) -> BertForMaskedLM | ElectraPair:
    """The model in a folder with weights, to go on with."""
    if training.objective == "rtd":
        return ElectraPair.from_pretrained(folder, place, dtype, training.seed)
    kind = _masked_lm(training)
    model, info = kind.from_pretrained(folder, place, dtype, training.seed, output_loading_info=True)
    if any(name.startswith("cls.seq_relationship") for name in info["unexpected_keys"]):
        say("its next-sentence head is left behind: --next-sentence goes on with it")
    return model


def _masked_lm(training: TrainingConfig) -> type[BertForMaskedLM]:
    return BertForPreTraining if training.next_sentence else BertForMaskedLM


def trainer_of(
    model: BertForMaskedLM | ElectraPair, data: Data, training: TrainingConfig, output: Path, options: dict[str, Any]
) -> Trainer:
    if isinstance(model, ElectraPair):
        return ReplacedTokenTrainer(model, data, training, output, options)
    return Trainer(model, data, training, output, options)


def words_of(training: TrainingConfig) -> Callable[[Record], str]:
    """What puts an evaluation into words."""
    return evaluation_of_pair if training.objective == "rtd" else evaluation


def evaluation(record: Record) -> str:
    """A record of the log in words, of a masked language model."""
    more = record.get("eval_next_sentence_accuracy")
    return (
        f"step {record['step']}: held-out loss {record['eval_loss']:.4f} "
        f"({record['eval_loss'] - record['unigram_loss']:+.4f} against frequencies), "
        f"accuracy {record['eval_accuracy']:.2%}" + ("" if more is None else f", next sentence {more:.2%}")
    )


def evaluation_of_pair(record: Record) -> str:
    """The same of an ELECTRA's two halves."""
    return (
        f"step {record['step']}: held-out generator loss {record['eval_mlm_loss']:.4f} "
        f"({record['eval_mlm_loss'] - record['unigram_loss']:+.4f} against frequencies), accuracy "
        f"{record['eval_accuracy']:.2%}; discriminator loss {record['eval_rtd_loss']:.4f}, accuracy "
        f"{record['eval_rtd_accuracy']:.2%} ({1 - record['eval_replaced']:.2%} of the tokens are original)"
    )
