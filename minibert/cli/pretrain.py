"""`minibert pretrain`: a masked language model, or an ELECTRA, from plain text files."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from tokenizers import Tokenizer

from minibert import backends
from minibert.backends import MOST_THREADS, Backend
from minibert.cli import app
from minibert.cli.inputs import SEPARATOR_HELP
from minibert.cli.objectives import (
    config_for,
    pretrained,
    refuse_generator_options,
    refuse_too_large,
    trainer_of,
    untrained,
    words_of,
)
from minibert.cli.options import BACKENDS, DETERMINISTIC_HELP, DTYPE_HELP, OWN_HELP, PRODUCTS_HELP, set_products
from minibert.cli.running import (
    SAVE_ERRORS_HELP,
    TENSORBOARD,
    WANDB,
    ended_by,
    fastest_or,
    follow,
    is_over,
    merged,
    resumed,
    say,
    say_views,
    stopped_by_signals,
)
from minibert.data import (
    SHIPPED_TEXT,
    Document,
    check_vocabulary,
    load_tokenizer,
    read_documents,
    special_ids,
    tokenizer_files,
    train_tokenizer,
    vocabulary_size,
)
from minibert.data.text import BLANK_LINE, TWO_BLANK_LINES
from minibert.errors import UserError
from minibert.lab.conform.own_kernels import HELP, load_kernels, refuse_misshapen
from minibert.model.bert import BertForMaskedLM
from minibert.model.checkpoint import has_weights, read_config
from minibert.model.config import NAMED, BertConfig, ElectraConfig
from minibert.model.electra_pair import ElectraPair
from minibert.train.config import OBJECTIVES, TrainingConfig
from minibert.train.loop import State, read_state, refuse_to_overwrite
from minibert.train.trainer import Trainer, prepare
from minibert.train.weights_and_biases import wandb_library

DEFAULT = TrainingConfig()
# What may change when a run is resumed: nothing here enters the arithmetic of a step, but max_steps by the schedule.
CHANGEABLE = {
    "max_steps", "logging_steps", "eval_steps", "save_steps", "save_total_limit", "save_errors",
    "checkpoint_activations",
}  # fmt: skip
MOVABLE = {
    "texts",
    "backend",
    "products",
    "tensorboard",
    "wandb",
}  # and of the options: the text is to be the same
DEFAULT_OPTIONS = {
    "document_separator": TWO_BLANK_LINES, "config": "mini", "dtype": "float32", "products": "float32",
    "deterministic": False, "tensorboard": False,
}  # fmt: skip
WHOLE_WORDS_HELP = (
    "Predict all pieces of a word or none. A word is a piece and those after it that begin with ##: a Chinese "
    "character, which BERT's tokenizers cut out by itself, is one alone."
)
OBJECTIVE_HELP = (
    "mlm: guess masked tokens. rtd: an ELECTRA, whose discriminator finds the tokens that a generator put in; it is at "
    "the top of --output, the generator in generator/."
)


def setting(name: str, help: str, flag: str | None = None) -> Any:
    """An option that sets a field of TrainingConfig; None where it is not given."""
    return typer.Option(
        None, flag or f"--{name.replace('_', '-')}", show_default=f"{getattr(DEFAULT, name):g}", help=help
    )


@app.command()
def pretrain(
    context: typer.Context,
    texts: list[Path] = typer.Argument(
        None,
        metavar="[TEXT ...]",
        help="Plain text files, UTF-8; if none, a shipped text.",
    ),
    output: Path = typer.Option(..., help="Folder for the model, its tokenizer, training_log.jsonl and checkpoints."),
    resume: bool = typer.Option(
        False, "--resume", help="Go on with the run in --output, exactly as if it had not stopped."
    ),
    document_separator: str = typer.Option(None, metavar="WHAT", show_default=TWO_BLANK_LINES, help=SEPARATOR_HELP),
    config: str = typer.Option(None, show_default="mini", help=f"{', '.join(NAMED)}, or a folder with config.json."),
    layers: int = typer.Option(None, min=1, max=1000, help="Layers, instead of those of --config."),
    hidden: int = typer.Option(None, min=64, max=65536, help="Channels, instead of those of --config, in 64s."),
    tokenizer: Path = typer.Option(None, show_default="trained on the text", help="A folder or file of a tokenizer."),
    vocab_size: int = typer.Option(
        None, min=6, max=1_000_000, show_default="8000", help="Tokens of the vocabulary trained on the text."
    ),
    objective: str = typer.Option(None, metavar="|".join(OBJECTIVES), show_default="mlm", help=OBJECTIVE_HELP),
    generator_size: float = setting("generator_size", "With rtd: the generator's width by the discriminator's."),
    rtd_weight: float = setting("rtd_weight", "With rtd: of the discriminator's loss."),
    max_steps: int = setting("max_steps", "Updates of the weights.", "--steps"),
    tokens_per_batch: int = setting("tokens_per_batch", "Tokens of one batch, packed."),
    gradient_accumulation_steps: int = setting("gradient_accumulation_steps", "Batches of one update."),
    max_seq_length: int = setting("max_seq_length", "Tokens of a sequence at most."),
    learning_rate: float = setting("learning_rate", "At its highest."),
    warmup_steps: int = typer.Option(
        None, show_default="10 % of --steps", help="Steps in which the learning rate rises; then it falls to 0."
    ),
    weight_decay: float = setting("weight_decay", "On matrices."),
    mlm_probability: float = setting("mlm_probability", "Share of the tokens to predict."),
    whole_word_mask: bool = typer.Option(None, "--whole-word-masking", help=WHOLE_WORDS_HELP),
    next_sentence: bool = typer.Option(None, "--next-sentence", help="Train on sentence pairs and their order too."),
    held_out: float = setting("held_out", "Share of the text to evaluate on."),
    logging_steps: int = setting("logging_steps", "Steps between lines of the log.", "--log-every"),
    eval_steps: int = setting("eval_steps", "Steps between evaluations.", "--eval-every"),
    save_steps: int = setting("save_steps", "Steps between checkpoints.", "--save-every"),
    save_total_limit: int = setting("save_total_limit", "Checkpoints kept, the newest.", "--keep"),
    save_errors: str = typer.Option(None, show_default="report", help=SAVE_ERRORS_HELP),
    tensorboard: bool = TENSORBOARD,
    wandb: str = WANDB,
    graph: bool = typer.Option(None, "--graph", help="Replay steps as CUDA graphs (cupy, emulator)."),
    checkpoint_activations: bool = typer.Option(
        None, "--checkpoint-activations", help="Less memory: backward computes each layer again."
    ),
    seed: int = setting("seed", "Of weights, order, masks and dropout."),
    backend: str = typer.Option(
        None, *BACKENDS, show_default="the fastest here", help=f"See `minibert backends`. {OWN_HELP}"
    ),
    dtype: str = typer.Option(None, show_default="float32", help=DTYPE_HELP),
    products: str = typer.Option(None, show_default="float32", help=PRODUCTS_HELP),
    deterministic: bool = typer.Option(None, "--deterministic", help=DETERMINISTIC_HELP),
    threads: int = typer.Option(
        None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads of kernels and BLAS."
    ),
    kernel: list[str] = typer.Option([], "--kernel", metavar="FILE.py:FUNCTION=OP", help=HELP),
) -> int:
    """Train a masked language model, or an ELECTRA, on text files. Ctrl-C saves, and --resume goes on."""
    given = dict(locals())
    settings = {name: given[name] for name in asdict(DEFAULT) if given.get(name) is not None}
    swapped = load_kernels(kernel)
    state = read_state(output) if resume else None
    if state is None:
        refuse_to_overwrite(output)
    training = TrainingConfig(**settings) if state is None else merged(state.config, settings, CHANGEABLE)

    options: dict[str, Any] = {
        name: given[name]
        for name in (
            "document_separator", "config", "layers", "hidden", "vocab_size", "dtype", "products", "backend",
            "deterministic", "tensorboard", "wandb",
        )
    }  # fmt: skip
    options["tokenizer"] = None if tokenizer is None else str(tokenizer.absolute())
    options["texts"] = [str(path.absolute()) for path in texts or ()]
    if state is not None:
        options = resumed(state.options, options, MOVABLE)
    options = {name: DEFAULT_OPTIONS.get(name) if value is None else value for name, value in options.items()}
    refuse_generator_options(training, settings, options["config"])
    if options["wandb"]:
        wandb_library()  # told before a vocabulary is trained
    context.with_resource(backends.determinism(options["deterministic"]))
    place = fastest_or(options["backend"], threads)
    place.require_dtype(options["dtype"])
    refuse_misshapen(swapped, place)
    set_products([place], options["products"])
    options["backend"] = backends.spec_of(place)
    if not options["texts"]:
        say(f"no TEXT given: training on the one that ships with minibert, {SHIPPED_TEXT.name}")
    documents = read_documents(options["texts"] or [SHIPPED_TEXT], options["document_separator"])

    trainer = make_trainer(state, documents, training, place, options, output)
    trainer.kernels = kernel
    say_views(options, output)
    if is_over(trainer):
        say(f"all {training.max_steps} steps were done before: --steps makes the run longer")
    with place.using(swapped) if swapped else nullcontext(), stopped_by_signals(trainer):
        follow(trainer, words_of(training), swapped)
    if not is_over(trainer):
        again = resume_command(output, kernel, options["backend"])
        say(f"stopped after step {trainer.step} of {training.max_steps}, and saved. To go on: {again}")
        return ended_by(trainer)
    kind = "ElectraForPreTraining" if training.objective == "rtd" else "BertForMaskedLM"
    say(f"the model is in {output}: minibert.{kind}.from_pretrained({str(output)!r})")
    return 0


# ----------------------------------------------------------------------------------------------------------- setting up


def make_trainer(
    state: State | None,
    documents: list[Document],
    training: TrainingConfig,
    place: Backend,
    options: dict[str, Any],
    output: Path,
) -> Trainer:
    """Model, tokens and optimiser: new ones, or those of the run that is resumed."""
    model: BertForMaskedLM | ElectraPair
    if state is None:
        model, tokenizer = new_model(documents, training, place, options)
    else:
        tokenizer = load_tokenizer(state.folder)
        refuse_too_large(read_config(state.folder), training, place, options["dtype"], state.folder)
        model = untrained(read_config(state.folder), training, place, options["dtype"], state.folder)
    trainer = trainer_of(model, prepare(documents, tokenizer, training), training, output, options)
    if state is not None:
        trainer.resume(state)
    say(f"backend {place.name}: {place.describe()}, {options['dtype']}")
    say(
        f"model: {model.config.num_hidden_layers} layers of {model.config.hidden_size} channels, vocabulary "
        f"{model.config.vocab_size}, {sum(p.data.size for p in model.parameters()):,} parameters"
        + (f", {model.generator_parameters:,} of them the generator's alone" if isinstance(model, ElectraPair) else "")
    )
    say(told(documents, trainer.data.tokens, max(1, len(options["texts"])), options["document_separator"]))
    say(
        f"sequences: {len(trainer.data.train.ids):,} tokens in {len(trainer.data.train):,} to train on, "
        f"{len(trainer.data.held_out.ids):,} held out"
    )
    say(f"to beat: guessing held-out tokens by frequency gives the loss {trainer.unigram_loss:.4f}")
    return trainer


def told(documents: list[Document], tokens: int, files: int, separator: str) -> str:
    """What was read; and how to have other documents, where there is no more than one in a file."""
    sentences = sum(map(len, documents))
    found = {"file": files, "document": len(documents), "sentence": sentences, "token": tokens}
    said = "text: " + ", ".join(f"{count:,} {what}{'s' * (count != 1)}" for what, count in found.items())
    if separator == TWO_BLANK_LINES and len(documents) <= files and sentences > files:
        said += "; no two blank lines separate documents: where something else does, name it, as "
        said += f"--document-separator {BLANK_LINE}"
    return said


def new_model(
    documents: list[Document], training: TrainingConfig, place: Backend, options: dict[str, Any]
) -> tuple[BertForMaskedLM | ElectraPair, Tokenizer]:
    """A model of a named size over the tokenizer's vocabulary; or one of a folder's config, with its weights if any."""
    config, dtype = options["config"], options["dtype"]
    folder = None if config in NAMED else Path(config)
    bert = resized(config_for(training, folder, config), options["layers"], options["hidden"])
    check_length(training, bert)
    tokenizer = choose_tokenizer(options, folder, documents, 8000 if folder is None else bert.vocab_size)
    if folder is None:
        bert = replace(bert, vocab_size=vocabulary_size(tokenizer), pad_token_id=special_ids(tokenizer).pad)
    check_vocabulary(tokenizer, bert.vocab_size)
    refuse_too_large(bert, training, place, dtype, folder)
    if folder is None or not has_weights(folder):
        return untrained(bert, training, place, dtype, folder), tokenizer
    if options["layers"] is not None or options["hidden"] is not None:
        raise UserError(f"--layers and --hidden cannot change the weights in {folder}: leave them out")
    say(f"beginning with the weights in {folder}")
    return pretrained(folder, training, place, dtype), tokenizer


def check_length(training: TrainingConfig, bert: BertConfig) -> None:
    """Before a tokenizer is trained, which may take a while."""
    if training.max_seq_length > bert.max_position_embeddings:
        raise UserError(
            f"--max-seq-length {training.max_seq_length} is more than the {bert.max_position_embeddings} positions of "
            "the model: lower it"
        )


def resized(config: BertConfig, layers: int | None, hidden: int | None) -> BertConfig:
    if layers is not None:
        config = replace(config, num_hidden_layers=layers)
    if hidden is not None:
        if isinstance(config, ElectraConfig) and config.embedding_size == config.hidden_size:
            config = replace(config, embedding_size=hidden)
        if hidden < 64 or hidden % 64:
            raise UserError(f"--hidden: expected a multiple of 64, the size of a head, got {hidden}")
        config = replace(config, hidden_size=hidden, num_attention_heads=hidden // 64, intermediate_size=4 * hidden)
    return config


def choose_tokenizer(
    options: dict[str, Any], folder: Path | None, documents: list[Document], usual_size: int
) -> Tokenizer:
    """The one named, else the one beside the config, else one trained on the text.

    Raises UserError where the folder holds weights without the tokenizer that gives their rows a meaning, or another is
    named; and for --vocab-size where no vocabulary is trained.
    """
    named, vocab_size = options["tokenizer"], options["vocab_size"] or usual_size
    beside = folder if folder is not None and tokenizer_files(folder) else None
    if options["vocab_size"] is not None and (named or beside):
        given = "--tokenizer names one" if named else f"--config {beside} holds one"
        raise UserError(f"--vocab-size is for a vocabulary trained on the text, and {given}: give either")
    if named is not None:
        tokenizer = load_tokenizer(named)
        if beside is not None and has_weights(beside) and load_tokenizer(beside).get_vocab() != tokenizer.get_vocab():
            raise UserError(f"--tokenizer {named} has another vocabulary than the weights in {beside}: leave it out")
        return tokenizer
    if beside is not None:
        return load_tokenizer(beside)
    if folder is not None and has_weights(folder):
        raise UserError(f"{folder} holds weights but no tokenizer: name the one they were trained with by --tokenizer")
    say(f"training a vocabulary of {vocab_size} tokens on the text ...")
    return train_tokenizer(documents, vocab_size)


def resume_command(output: Path, kernel: list[str], backend: str) -> str:
    """The command that goes on; code of a user's own it names again."""
    own = [f"--backend {backend}"] if ":" in backend else []
    own += [f"--kernel {spec}" for spec in kernel]
    return " ".join(["minibert pretrain", "--output", str(output), "--resume", *own])
