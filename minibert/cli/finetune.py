"""`minibert finetune`: a model for a task from a pretrained one and labelled examples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import typer
from tokenizers import Tokenizer

from minibert import backends
from minibert.backends import MOST_THREADS, Backend
from minibert.cli import app
from minibert.cli.labelled import TASKS, Columns, note_of, read_examples, task_for
from minibert.cli.options import BACKENDS, DETERMINISTIC_HELP, DTYPE_HELP, OWN_HELP
from minibert.cli.running import (
    SAVE_ERRORS_HELP,
    TENSORBOARD,
    WANDB,
    ended_by,
    fastest_or,
    follow,
    is_over,
    merged,
    require_memory,
    resumed,
    say,
    say_views,
    stopped_by_signals,
)
from minibert.data import load_tokenizer
from minibert.errors import UserError
from minibert.model.checkpoint import read_config, write_atomically
from minibert.model.sentence_config import POOLINGS, encoder_folder
from minibert.tasks.embedding_task import Embed, sentence_config_in
from minibert.tasks.examples import SINGLE
from minibert.tasks.finetune import (
    PEFT,
    PEFT_SETTINGS,
    FineTuning,
    FineTuningConfig,
    evaluate,
    load_model,
    prefixed,
    split_examples,
)
from minibert.tasks.metrics import by_group, confusion_matrix, group_report
from minibert.tasks.picture import draw_confusion_matrix, figure_library
from minibert.tasks.pipeline import fine_tuned
from minibert.tasks.task import Classify, Prepared, Task
from minibert.train.loop import Record, read_state, refuse_to_overwrite
from minibert.train.memory import Memory, Passes, predict

DEFAULT = FineTuningConfig()
DEFAULT_OPTIONS = {"validation_split": 0.1, "dtype": "float32", "deterministic": False, "tensorboard": False}
# What may change when a run is resumed: nothing here enters the arithmetic of a step.
CHANGEABLE = {
    "logging_steps", "save_steps", "save_total_limit", "save_errors", "checkpoint_activations",
    "early_stopping_patience", "tokens_per_batch",
}  # fmt: skip
MOVABLE = {"model", "train", "validation", "test", "group_column", "backend", "tensorboard", "wandb"}
PATHS = ("model", "train", "validation", "test")
OPTIONS = (
    "task", *PATHS, "validation_split", *Columns._fields, "group_column", "pooling", "tensorboard", "wandb", "dtype",
    "deterministic", "backend",
)  # fmt: skip
PEFT_LEARNING_RATE = 3e-4  # what begins at zero, and is small, takes more
TEST_RESULTS, CONFUSION = "test_results.json", "confusion_matrix.png"


def setting(name: str, help: str) -> Any:
    """An option that sets a field of FineTuningConfig; None where it is not given."""
    shown = getattr(DEFAULT, name)
    return typer.Option(None, f"--{name.replace('_', '-')}", show_default=str(shown) if shown else False, help=help)


@app.command()
def finetune(
    context: typer.Context,
    task: str = typer.Argument(metavar="TASK", help="classify, regress, tag, answer or embed."),
    model: Path = typer.Option(None, "--model", help="Folder of the pretrained model, with its tokenizer."),
    train: Path = typer.Option(
        None,
        "--train",
        help="Examples: CSV, TSV or JSONL; CoNLL or CoNLL-U to tag; SQuAD's JSON to answer. To embed: pairs of texts "
        "that belong together, perhaps with a negative, or with a score from -1 to 1.",
    ),
    output: Path = typer.Option(..., help="Folder for the best model, its tokenizer, the log and the state."),
    validation: Path = typer.Option(None, help="Examples by which the best model is chosen; if none, some of --train."),
    validation_split: float = typer.Option(
        None, min=0.001, max=0.9, show_default="0.1", help="Share of --train without --validation."
    ),
    test: Path = typer.Option(None, help="Examples on which the best model is judged at the end."),
    resume: bool = typer.Option(False, "--resume", help="Go on with the run in --output, as if it had not stopped."),
    text_column: str = typer.Option(None, show_default="guessed", help="Column of the text."),
    pair_column: str = typer.Option(None, show_default="guessed", help="Column of a second text."),
    negative_column: str = typer.Option(
        None, show_default="guessed", help="To embed: column of a text that is like the first, and not its pair."
    ),
    label_column: str = typer.Option(
        None, show_default="guessed", help="Column of the label, class, number or tag; to embed of a score, if any."
    ),
    token_column: str = typer.Option(None, show_default="the first", help="Column of the words, to tag."),
    label_separator: str = typer.Option(None, help="Cuts a label into several of which any may hold."),
    group_column: str = typer.Option(None, help="Column by whose values the metrics of --test are given too."),
    num_train_epochs: float = setting("num_train_epochs", "Passes over the examples."),
    per_device_train_batch_size: int = setting(
        "per_device_train_batch_size", "Examples of one pass; to embed, negatives of each other."
    ),
    gradient_accumulation_steps: int = setting(
        "gradient_accumulation_steps", "Passes of one update; 1 to embed without scores: it adds no negatives."
    ),
    max_seq_length: int = typer.Option(
        None, show_default="128; 384 to answer; to embed the model's", help="Tokens of a sequence at most."
    ),
    pooling: str = typer.Option(
        None, show_default="as the folder says, else mean", help=f"To embed: {' or '.join(POOLINGS)}."
    ),
    learning_rate: float = typer.Option(
        None, show_default=f"{DEFAULT.learning_rate:g}; {PEFT_LEARNING_RATE:g} with --peft", help="At its highest."
    ),
    warmup_ratio: float = setting("warmup_ratio", "Share of the steps in which the learning rate rises."),
    weight_decay: float = setting("weight_decay", "On matrices."),
    max_grad_norm: float = setting("max_grad_norm", "Gradients are clipped to this norm."),
    layerwise_lr_decay: float = setting("layerwise_lr_decay", "Factor of the learning rate from layer to layer, down."),
    freeze: str = setting("freeze", "What is not trained: embeddings, layers:0-3, or both, with a comma."),
    class_weights: str = setting("class_weights", "balanced: rare classes count as much as frequent ones."),
    early_stopping_patience: int = setting(
        "early_stopping_patience", "Evaluations without a better one before it ends."
    ),
    metric_for_best_model: str = setting(
        "metric_for_best_model", "What chooses the best model; eval_loss, or a metric."
    ),
    peft: str = setting(
        "peft", f"{', '.join(PEFT)}: the model is frozen; what is put beside it, and the head, is trained."
    ),
    lora_r: int = setting("lora_r", "Rank of an update."),
    lora_alpha: float = setting("lora_alpha", "Their factor is lora_alpha / lora_r."),
    lora_dropout: float = setting("lora_dropout", "Of what an update reads."),
    target_modules: str = setting("target_modules", "Linear layers with an update, by ends of names; or all-linear."),
    num_virtual_tokens: int = setting("num_virtual_tokens", "Of a prefix."),
    logging_steps: int = setting("logging_steps", "Steps from line to line of the log."),
    save_steps: int = setting("save_steps", "Steps between checkpoints; there is one for each new best model too."),
    save_total_limit: int = setting("save_total_limit", "Checkpoints kept, the newest."),
    save_errors: str = typer.Option(None, show_default="report", help=SAVE_ERRORS_HELP),
    checkpoint_activations: bool = typer.Option(None, "--checkpoint-activations", help="Less memory, more time."),
    tensorboard: bool = TENSORBOARD,
    wandb: str = WANDB,
    seed: int = setting("seed", "Of the head, order and dropout."),
    backend: str = typer.Option(
        None, *BACKENDS, show_default="the fastest here", help=f"See `minibert backends`. {OWN_HELP}"
    ),
    dtype: str = typer.Option(None, show_default="float32", help=DTYPE_HELP),
    deterministic: bool = typer.Option(None, "--deterministic", help=DETERMINISTIC_HELP),
    threads: int = typer.Option(None, min=1, max=MOST_THREADS, show_default="all cores", help="Threads."),
) -> int:
    """Fine-tune a pretrained model on labelled examples. Ctrl-C saves, and --resume goes on."""
    options, settings = asked(locals())
    state = read_state(output, FineTuningConfig) if resume else None
    if state is None:
        refuse_to_overwrite(output)
        options, config = begun(options, settings)
    else:
        config = merged(state.config, settings, CHANGEABLE)
        options = with_defaults(resumed(state.options, options, MOVABLE))
    context.with_resource(backends.determinism(options["deterministic"]))
    place = fastest_or(options["backend"], threads)
    place.require_dtype(options["dtype"])

    run = make_run(options, config, place, output)
    judge = test_part(run)
    say_views(options, output)
    if state is not None:
        run.resume(state)
        say(f"going on after step {run.step}")
    with stopped_by_signals(run):
        follow(run, evaluation)
    if not is_over(run):
        say(f"stopped after step {run.step} of {run.max_steps}, and saved. To go on: "
            f"minibert finetune {task} --output {output} --resume")  # fmt: skip
        return ended_by(run)
    if run.ended_early:
        say(f"ended after step {run.step}: {run.progress['evaluations_since']} evaluations without a better one")
    best = run.progress["best"]["step"]
    say(f"the best model, of step {best}, is in {output} (by {run.metric.removeprefix('eval_')})")
    if judge is not None:
        tested(run, judge)
    return 0


def asked(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a command line says of files and machine, and the settings of FineTuningConfig that it gives.

    Raises UserError for options that the task has not.
    """
    task = given["task"]
    if task not in TASKS:
        raise UserError(f"TASK: expected {', '.join(TASKS)}, got {task!r}")
    Columns(**{name: given[name] for name in Columns._fields}).of(task)
    if given["pooling"] is not None and task != "embed":
        raise UserError(f"--pooling: expected with embed, got it with {task}: leave it out")
    options = {name: given.get(name) for name in OPTIONS}
    options |= {name: None if given.get(name) is None else str(given[name].absolute()) for name in PATHS}
    return options, {name: given[name] for name in asdict(DEFAULT) if given.get(name) is not None}


def begun(options: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[dict[str, Any], FineTuningConfig]:
    """The options and the config of a new run. Raises UserError for what is missing, and for what would go unheeded."""
    if options["model"] is None or options["train"] is None:
        raise UserError("expected --model, a folder, and --train, a file: name both")
    for name in settings:
        kinds = PEFT_SETTINGS.get(name)
        if kinds is not None and settings.get("peft") not in kinds:
            raise UserError(f"--{name.replace('_', '-')}: expected with --peft {' or '.join(kinds)}: leave it out")
    config = FineTuningConfig(**{**usual_settings(options["task"], Path(options["model"]), settings), **settings})
    return with_defaults(options), config


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: DEFAULT_OPTIONS.get(name) if value is None else value for name, value in options.items()}


def usual_settings(task: str, model: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings where none are given: of a task, a model and the way it is trained."""
    if task == "embed":
        return {"max_seq_length": sentence_config_in(model).max_seq_length}
    peft, positions = settings.get("peft"), read_config(model).max_position_embeddings
    if peft == "prefix":
        positions -= settings.get("num_virtual_tokens", DEFAULT.num_virtual_tokens)
    longest = max(1, min(384 if task == "answer" else 128, positions))
    return {"max_seq_length": longest, **({"learning_rate": PEFT_LEARNING_RATE} if peft else {})}


# ----------------------------------------------------------------------------------------------------------- setting up


def make_run(
    options: dict[str, Any], config: FineTuningConfig, place: Backend, output: Path, say: Callable[[str], None] = say
) -> FineTuning:
    """Read examples, tokenizer and model, and say what was found."""
    kind, folder, columns = options["task"], Path(options["model"]), columns_in(options)
    tokenizer = load_tokenizer(encoder_folder(folder) if kind == "embed" else folder)
    examples = read_examples(kind, Path(options["train"]), columns)
    if note := note_of(examples):
        say(note)
    embed = Embed.of(examples, folder, options["pooling"]) if kind == "embed" else None
    task = embed or task_for(kind, examples, folder)
    if options["validation"] is None:
        share = options["validation_split"]
        train, held_out = divided(task, examples, tokenizer, config, share)
        say(f"no --validation: {share:.0%} of the examples are held out for it")
    else:
        train = task.prepare(examples, tokenizer, config.max_seq_length)
        held_out = prepared(task, kind, Path(options["validation"]), columns, tokenizer, config.max_seq_length)
    model, new = load_model(task, folder, place, options["dtype"], config.seed)
    run = FineTuning(model, task, train, held_out, tokenizer, config, output, options, new=new, base=str(folder))
    refuse_too_large(run)
    trained = model.num_parameters(only_trainable=True)
    said = f"{len(task.names)} labels: {', '.join(task.names[:12])}{' ...' if len(task.names) > 12 else ''}"
    headed = embed.description(train) if embed else "a new head" if new else "with its head"
    say(f"backend {place.name}: {place.describe()}, {options['dtype']}")
    say(
        f"model: {type(model).__name__} from {folder}, {trained:,} of {model.num_parameters():,} parameters trained, "
        f"{headed}" + (f"; {said}" if kind in ("classify", "tag") else "")
    )
    say(
        f"examples: {len(train.examples):,} to train on ({len(train.sequences.ids):,} tokens), "
        f"{len(held_out.examples):,} to choose by; {run.max_steps:,} steps"
    )
    for note in train.notes:
        say(f"note: {note}")
    return run


def refuse_too_large(run: FineTuning) -> None:
    """Raise UserError where a step would not find room in memory."""
    config, model = run.config, run.model
    size, lengths = config.per_device_train_batch_size, run.train.lengths
    tokens = max(int(lengths[rows[i : i + size]].sum()) for rows in run.batches(0) for i in range(0, len(rows), size))
    counts = model.num_parameters(), model.num_parameters(only_trainable=True)

    def predicted(passes: Passes) -> Memory | None:
        return predict(model.config, passes, model.backend.name, run.options["dtype"], *counts)

    def flags(found: Passes) -> str:
        passes = found.accumulated // config.gradient_accumulation_steps
        recompute = " --checkpoint-activations" if found.recompute else ""
        return (
            f"--per-device-train-batch-size {max(1, size // passes)} "
            f"--gradient-accumulation-steps {found.accumulated}{recompute}"
        )

    passes = Passes(
        tokens, config.gradient_accumulation_steps, 0, config.checkpoint_activations,
        min(config.tokens_per_batch, int(run.validation.lengths.sum())),
        saving=config.num_train_epochs > 1 or config.save_steps < run.max_steps,
    )  # fmt: skip
    whole = run.task.in_batch  # the examples of a pass are told apart from each other
    least = tokens if whole else max(int(lengths.max()), -(-tokens // size))
    require_memory(model.backend, predicted, passes, least, flags)


def prepared(
    task: Task, kind: str, path: Path, columns: Columns, tokenizer: Tokenizer, max_seq_length: int
) -> Prepared:
    """A file's examples, as the model takes them. Raises UserError for labels that the task does not have."""
    return task.prepare(read_examples(kind, path, columns), tokenizer, max_seq_length)


def columns_in(options: Mapping[str, Any]) -> Columns:
    return Columns(*(options[name] for name in Columns._fields))


def test_part(run: FineTuning) -> Prepared | None:
    """The examples of --test, with all that judging them needs: what is amiss shows before the training."""
    options, length = run.options, run.config.max_seq_length
    if options["test"] is None:
        if options["group_column"] is not None:
            raise UserError("--group-column: expected with --test, by whose rows figures are given")
        return None
    part = prepared(run.task, options["task"], Path(options["test"]), columns_in(options), run.tokenizer, length)
    groups_of(run.task, part, options["group_column"])
    if one_of_several(run.task):
        figure_library()
    return part


def divided(
    task: Task, examples: Any, tokenizer: Tokenizer, config: FineTuningConfig, share: float
) -> tuple[Prepared, Prepared]:
    """Examples to train on, and some held out, drawn by seed; one at least of each."""
    first, second = (
        task.prepare(examples.subset(rows), tokenizer, config.max_seq_length)
        for rows in split_examples(len(examples), share, config.seed)
    )
    return first, second


# ------------------------------------------------------------------------------------------------------------- results


def evaluation(record: Record) -> str:
    """A record of the log in words."""
    figures = ", ".join(
        f"{name.removeprefix('eval_').replace('_', ' ')} {'-' if value is None else f'{value:.4f}'}"
        for name, value in record.items()
        if name.startswith("eval_") and isinstance(value, float | None)
    )
    return f"epoch {record['epoch']:g}: {figures}"


def tested(run: FineTuning, part: Prepared) -> None:
    """Judge the best model on examples that had no part in training; the figures are kept beside the model."""
    best = fine_tuned(run.output, run.model.backend, run.options["dtype"])
    results = judged(run.task, best.model, part, run.config.tokens_per_batch, run.options["group_column"])
    text = json.dumps(results, indent=2) + "\n"
    write_atomically(run.output / TEST_RESULTS, lambda file: file.write_text(text, encoding="utf-8"))
    if matrix := results.get("test_confusion_matrix"):
        draw_confusion_matrix(np.array(matrix), run.task.names, run.output / CONFUSION)
        say(f"the confusion matrix is in {run.output / CONFUSION}")


def judged(
    task: Task, model: Any, part: Prepared, tokens_per_batch: int, group_column: str | None, prefix: str = "test"
) -> dict[str, Any]:
    """Print how good a model is on examples; gives the figures."""
    groups = groups_of(task, part, group_column)
    for note in part.notes:
        say(f"note: {note}")
    loss, scores, outputs = evaluate(task, model, part, tokens_per_batch)
    results: dict[str, Any] = {f"{prefix}_loss": loss, **prefixed(prefix, scores.figures)}
    say(f"{part.examples.name}: {len(part.examples):,} examples, loss {'-' if loss is None else f'{loss:.4f}'}")
    say(", ".join(f"{n.replace('_', ' ')} {'-' if v is None else f'{v:.4f}'}" for n, v in scores.figures.items()))
    say(scores.report.rstrip("\n"))
    if one_of_several(task):
        assert part.targets is not None
        matrix = confusion_matrix(part.targets, outputs.argmax(axis=-1), len(task.names))
        results[f"{prefix}_confusion_matrix"] = matrix.tolist()
    if groups is not None:
        assert isinstance(task, Classify)
        figures = by_group(groups, lambda rows: task.scores(part, outputs, rows))
        say(group_report(figures).rstrip("\n"))
        results[f"{prefix}_by_{group_column}"] = figures
    return results


def groups_of(task: Task, part: Prepared, column: str | None) -> list[str] | None:
    """What a column holds, row by row. Raises UserError where there are no rows, or no such column."""
    if column is None:
        return None
    if not isinstance(task, Classify):
        raise UserError("--group-column: expected with classify or regress, whose files have columns")
    return part.examples.groups(column)


def one_of_several(task: Task) -> bool:
    return isinstance(task, Classify) and task.problem_type == SINGLE
