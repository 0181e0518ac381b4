"""The run of a task's bench: for each seed the same fine-tuning by every side, in turns; metrics, times and memory.

All sides of a seed have the same weights, head, examples, order of batches, schedule, optimiser, clipping and dropout
rates; first they are held to the same loss and gradient norm without dropout. They take turns of some steps each.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from bench.step import SAME
from bench.tasks import memory, tables
from bench.tasks.fetch import Published, examples_in, fetched, sha256
from bench.tasks.given import Beside, Given, Step
from bench.tasks.options import MODEL, REQUIREMENT, Options, command_line, vars_of
from bench.tasks.sides import LOW_RANK, low_rank, make_side, step_flops
from bench.tasks.texts import split
from bench.timing import frame, harness, sides
from minibert.backends import Backend
from minibert.cli.options import notes, refuse_unwritable
from minibert.data import load_tokenizer
from minibert.errors import UserError, pip_install
from minibert.lab.measure import quiet
from minibert.model.config import BertConfig
from minibert.tasks.examples import MULTI, REGRESSION, SINGLE, TextExamples
from minibert.tasks.finetune import load_model
from minibert.tasks.metrics import scikit_learn
from minibert.tasks.task import Classify, Prepared
from minibert.tasks.task import Task as Tuned

TURN = 10  # steps of a side, one after the other
BESIDE = ("tokenizers", "scikit-learn", "seqeval", "sentence-transformers")  # libraries on which figures hang too
FIRST = 5  # steps of each side that are not timed: they compile, and allocate
Progress = Callable[[str], None]


def packaged_model(train: Any, empty: Path, options: Options) -> Path:
    """The folder of the installed MiniLM, found without importing it."""
    spec = importlib.util.find_spec(MODEL)
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / "model" / "model.safetensors").is_file():
            return Path(place) / "model"
    raise UserError(f"--model: expected a folder, as {MODEL} is not installed: {pip_install('--no-deps', REQUIREMENT)}")


class Task(NamedTuple):
    """What a command measures."""

    name: str
    about: str
    sets: Mapping[str, Published]
    tuned: Callable[[Any, Path], Tuned]  # what a model, that in the folder, is fine-tuned to by such examples
    metrics: tuple[str, ...]  # that are shown
    learning_rate: float = 5e-5
    beside: Callable[[Tuned, Tokenizer, int], Beside] | None = None  # what else it is judged by, cut at so many tokens
    model: Callable[[Any, Path, Any], Path] = packaged_model  # by examples to train on, an empty folder and the options
    floor_by: str = "word"  # what the linear model counts: words, or each char
    others: tuple[str, ...] = ("torch", "transformers")  # libraries to compare with
    needs: tuple[str, ...] = ("[parity]",)  # what brings them


def classify(examples: TextExamples, folder: Path) -> Tuned:
    """By the labels of the examples."""
    return Classify.of(examples)


def command(task: Task, options: type[Options] = Options) -> Callable[..., int]:
    about = (
        f"{task.about}\n\n--set: {', '.join(task.sets)}. Exit status 1 if a figure is impossible or the sides do not "
        "compute the same."
    )
    return frame.with_options(options, lambda given: run(task, given), about)


def run(task: Task, options: Options) -> int:
    """Measure, show and write. Raises UserError for options that make no sense and for what is missing."""
    refuse_unwritable(json=options.json_file)
    said = command_line(task.name, options)
    if options.peft and options.peft not in LOW_RANK:
        raise UserError(f"--peft: expected {' or '.join(LOW_RANK)}, got {options.peft!r}")
    if options.set and options.set not in task.sets:
        raise UserError(f"--set: expected {' or '.join(task.sets)}, got {options.set!r}")
    published = task.sets[options.set or next(iter(task.sets))]
    for library in task.others:
        if not options.peft and importlib.util.find_spec(library) is None:
            raise UserError(f"{library} is not installed, to compare with: {pip_install(*task.needs)}")
    scikit_learn()
    rate = task.learning_rate if options.learning_rate is None else options.learning_rate
    threads, length = options.threads or harness.cores(), options.length or published.length
    options = replace(options, length=length, learning_rate=rate, threads=threads)
    place, *others = harness.cpu_backends(options.backend, threads)
    if others:
        raise UserError(f"--backend: expected one, got {options.backend}")
    path = options.file or fetched(published)
    examples = examples_in(published, path)
    parts = split(examples, options.small, options.rows)
    data = {"set": published.file, "package": published.source, "sha256": sha256(path),
            "train": len(parts[0]), "test": len(parts[1])}  # fmt: skip
    with tempfile.TemporaryDirectory() as empty:
        folder = options.model or task.model(parts[0], Path(empty), options)
        tuned, tokenizer = task.tuned(examples, folder), load_tokenizer(folder)
        prepared = [tuned.prepare(part, tokenizer, length) for part in parts]
        if tuned.problem_type == SINGLE and len(np.unique(prepared[0].targets)) < 2:
            raise UserError(f"{path.name}: the first {len(parts[0])} to train on have one label only: mix the rows")
        document = {
            "bench": "tasks", "task": task.name, "command": said, "command_options": vars_of(options), "data": data,
            **measured(task, options, place, folder, tuned, tokenizer, *prepared),
        }  # fmt: skip
    return tables.report(document, options.json_file)


def measured(
    task: Task, options: Options, place: Backend, folder: Path, tuned: Tuned, tokenizer: Tokenizer, train: Prepared,
    test: Prepared,
) -> dict[str, Any]:  # fmt: skip
    """What is found of the model in a folder, seed by seed."""
    assert options.length is not None and options.threads is not None
    threads = options.threads
    beside = task.beside and task.beside(tuned, tokenizer, options.length)
    load, about = quiet.Load(), harness.fingerprint([place], threads)
    about["versions"] |= harness.versions_of(BESIDE)
    sides.say_where(about)

    def one(name: str, progress: Progress) -> dict[str, Any]:
        seed = int(name.split()[1])
        model, new = load_model(tuned, folder, place, seed=seed)
        config = model.config if options.dropout is None else without(model.config, options.dropout)
        given = Given(tuned, train, test, tokenizer, config, model.state_dict(), new, threads, beside)
        del model
        facts = measure(options, given, place, seed, progress)
        if seed == 0 and options.times and not tuned.in_batch:
            spec = memory.spec_of(given, options.sides(place, seed), place)
            harness.add_memory(facts, "bench.tasks.memory:peak", spec, progress if options.memory else None)
        return facts

    names = [f"seed {seed}" for seed in range(1 if options.small else options.seeds)]
    found, peaks = harness.between_peaks(names, one, notes) if options.times else (each(names, one), None)
    rates = {f"{who} ({name})": facts["seconds_per_flop"][who] for name, facts in found.items() for who in
             facts.get("seconds_per_flop", {})}  # fmt: skip
    return {
        **about, "sequences": {"train": len(train.sequences), "test": len(test.sequences)},
        "notes": [*train.notes, *test.notes], "metrics": list(task.metrics),
        "floor": floor(tuned, train, test, task.floor_by), "peaks": peaks, "measures": found,
        "disturbance": load.disturbance(threads, rates),
    }  # fmt: skip


def each(names: Sequence[str], one: Callable[[str, Progress], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run each, and time nothing."""
    with notes.status("") as status:
        return {name: one(name, lambda text, name=name: status.update(f"{name}: {text}")) for name in names}  # type: ignore[misc]


def without(config: BertConfig, rate: float) -> BertConfig:
    """With this rate wherever something is dropped."""
    return replace(config, hidden_dropout_prob=rate, attention_probs_dropout_prob=rate, classifier_dropout=rate)


# -------------------------------------------------------------------------------------------------------------- a seed


def measure(options: Options, given: Given, place: Backend, seed: int, progress: Progress) -> dict[str, Any]:
    """A run of every side. Where they do not find the same without dropout, that is all that is told."""
    progress("making the models")
    made = [make_side(name, given, config, place) for name, config in options.sides(place, seed).items()]
    steps = made[0].steps()
    facts: dict[str, Any] = {
        "libraries": {side.name: side.library for side in made},
        "trained": {side.name: side.trained for side in made},
        "without_dropout": {side.name: dict(zip(("loss", "gradient_norm"), side.quiet(steps[0]), strict=True))
                            for side in made},
    }  # fmt: skip
    facts["refused"] = refusal(facts["without_dropout"])
    if facts["refused"]:
        return facts
    contestants = [harness.Contestant(side.name, side.step, 0) for side in made]
    if given.task.in_batch:  # there is no new head: the pretrained model is good for something already
        facts["untuned"] = {side.name: judged(given, side, progress) for side in made}
    facts["losses"] = train(made, contestants, steps, seed, progress)
    facts["metrics"] = {side.name: judged(given, side, progress) for side in made}
    return {**facts, **timings(given, contestants, steps, made[0].name)} if options.times else facts


def judged(given: Given, side: Any, progress: Progress) -> dict[str, Any]:
    """The figures of a side's model as it is now."""
    progress(f"{side.name}: judging")
    figures = given.task.scores(given.test, side.outputs(given.test)).figures
    beside = given.beside
    return figures if beside is None else {**figures, **beside.figures(side.outputs(beside.part))}


def timings(
    given: Given, contestants: Sequence[harness.Contestant], steps: Sequence[Step], ours: str
) -> dict[str, Any]:
    """What is told of the seconds that the steps took; the first ones compile, and are told apart."""
    facts: dict[str, Any] = {"training_s": {one.name: sum(one.seconds) for one in contestants}, "seconds_per_flop": {}}
    timed = steps[min(FIRST, len(steps) - 1) :]
    for one in contestants:
        flops = [step_flops(one.name, given, step) for step in timed]
        one.first_s, one.seconds = one.seconds[0], one.seconds[-len(timed) :]
        one.flops = int(np.median(flops))
        facts["seconds_per_flop"][one.name] = (np.array(one.seconds) / flops).tolist()
    return {**facts, **harness.compared(contestants, [ours])}


def refusal(found: Mapping[str, Mapping[str, float]]) -> str:
    """Why the sides do not compute the same; empty where they do. What is frozen has no part in a gradient's norm."""
    for kind in (True, False):
        alike = {who: list(figures.values()) for who, figures in found.items() if low_rank(who) == kind}
        if alike and (said := harness.apart(alike, SAME)):
            return said
    return harness.apart({who: [figures["loss"]] for who, figures in found.items()}, SAME)


def train(
    made: Sequence[Any], contestants: Sequence[harness.Contestant], steps: Sequence[Step], seed: int, progress: Progress
) -> dict[str, list[float]]:
    """All steps by all sides, some at a time, who begins changing from turn to turn. Adds each step's seconds."""
    losses: dict[str, list[float]] = {side.name: [] for side in made}
    turns = list(zip(made, contestants, strict=True))
    gc.collect()
    gc.disable()
    try:
        for number, start in enumerate(range(0, len(steps), TURN)):
            for side, one in turns if (number + seed) % 2 == 0 else reversed(turns):
                progress(f"{side.name}: step {start} of {len(steps)}")
                prepared = [side.prepare(step) for step in steps[start : start + TURN]]
                time.sleep(harness.SETTLE)
                for each in prepared:
                    began = time.perf_counter()
                    losses[side.name].append(side.step(each))
                    one.seconds.append(time.perf_counter() - began)
            gc.collect()
    finally:
        gc.enable()
    return losses


def floor(task: Tuned, train: Prepared, test: Prepared, by: str) -> dict[str, float | None]:
    """The metrics of a linear model on TF-IDF of words, or of each char, and pairs of them: what fine-tuning of texts
    has to beat.
    """
    if not isinstance(task, Classify):
        return {}
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import LinearSVC

    words = TfidfVectorizer(analyzer=by, ngram_range=(1, 2))
    given, asked = words.fit_transform(train.examples.texts), words.transform(test.examples.texts)
    models = {REGRESSION: Ridge(), MULTI: OneVsRestClassifier(LinearSVC())}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Label .* is present in all")  # as sklearn says of a label that no row has
        found = models.get(str(task.problem_type), LinearSVC()).fit(given, train.targets).predict(asked)
    if task.problem_type == REGRESSION:
        outputs = found[:, None]
    else:
        outputs = found - 0.5 if task.problem_type == MULTI else np.eye(len(task.names))[found]
    return task.scores(test, outputs).figures
