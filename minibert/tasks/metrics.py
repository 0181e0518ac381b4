"""How good predictions are: figures for JSON, and a report to be read.

Shares run from 0 to 1, those of answers too, which SQuAD's own script multiplies by 100. A figure that is not defined,
as the correlation with a constant, is None. Classes are counted by scikit-learn, entities by seqeval, correlations by
SciPy; answers by SQuAD's rules, in this file.
"""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minibert.errors import UserError, pip_install
from minibert.tasks.labels import sorted_names
from minibert.tasks.tags import is_entity_tag, with_ends

Figures = dict[str, Any]  # of JSON: numbers, None, and objects of them

# The figures that GLUE ranks by (Wang et al. 2018, table 1), by the names of Hugging Face's data sets.
GLUE = {
    "cola": ("matthews_correlation",), "sst2": ("accuracy",), "mrpc": ("f1", "accuracy"), "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"), "mnli": ("accuracy",), "qnli": ("accuracy",), "rte": ("accuracy",),
    "wnli": ("accuracy",),
}  # fmt: skip
# What a checkpoint is the best by, where nothing else is asked for.
MAIN = {
    "single_label_classification": "accuracy", "multi_label_classification": "f1_micro", "regression": "pearson",
    "entities": "entity_f1", "tags": "accuracy", "answers": "f1", "similarity": "spearman", "search": "mrr_10",
}  # fmt: skip
PARTS = ("precision", "recall", "f1")


class Scores(NamedTuple):
    """Figures, and a report of several lines."""

    figures: Figures
    report: str


def scikit_learn() -> Any:
    """sklearn.metrics. Raises UserError where it is missing."""
    try:
        import sklearn.metrics
    except ImportError as error:
        raise UserError(f"metrics need scikit-learn: {pip_install('[tasks]')}") from error
    return sklearn.metrics


def seqeval_metrics() -> Any:
    """seqeval.metrics. Raises UserError where it is missing."""
    try:
        import seqeval.metrics
    except ImportError as error:
        raise UserError(f"metrics of entities need seqeval: {pip_install('[tasks]')}") from error
    return seqeval.metrics


def finite(value: Any) -> float | None:
    """A float, None for NaN and infinity, which JSON cannot hold."""
    return float(value) if math.isfinite(value) else None


# ----------------------------------------------------------------------------------------------------------- classes


def class_metrics(targets: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Scores:
    """One of K classes each, (S,) integers: accuracy, F1 by count and by class, Matthews' correlation.

    Classes that occur in neither count in no mean. Of two classes `f1` is that of the second, `names[1]`. The report
    is scikit-learn's.
    """
    metrics = scikit_learn()
    if len(targets) == 0:
        return Scores({"accuracy": None, "f1_micro": None, "f1_macro": None, "matthews_correlation": None}, "no rows\n")
    occurring = np.union1d(targets, predicted)
    figures = {
        "accuracy": finite(metrics.accuracy_score(targets, predicted)),
        "f1_micro": finite(metrics.f1_score(targets, predicted, average="micro", zero_division=0)),
        "f1_macro": finite(metrics.f1_score(targets, predicted, average="macro", zero_division=0)),
        "matthews_correlation": 0.0,  # by custom, where all is of one class
    }
    if len(occurring) > 1:
        figures["matthews_correlation"] = finite(metrics.matthews_corrcoef(targets, predicted))
    if len(names) == 2:
        figures["f1"] = finite(metrics.f1_score(targets, predicted, pos_label=1, zero_division=0))
    report = metrics.classification_report(
        targets, predicted, labels=occurring, target_names=[names[k] for k in occurring], digits=4, zero_division=0
    )
    return Scores(figures, report)


def confusion_matrix(targets: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(K, K) int64: how often row k, the true class, was taken for column j."""
    matrix: np.ndarray = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(matrix, (targets, predicted), 1)
    return matrix


def multi_label_metrics(
    targets: np.ndarray, probabilities: np.ndarray, names: Sequence[str], threshold: float = 0.5
) -> Scores:
    """Any of K classes each, (S, K): 1 where true, and how likely. F1 by count and by class; the share wholly right.

    A class that never occurs and is never predicted has F1 0, as in scikit-learn.
    """
    metrics = scikit_learn()
    true, predicted = targets > 0.5, probabilities >= threshold
    if len(true) == 0:
        return Scores({"f1_micro": None, "f1_macro": None, "subset_accuracy": None}, "no rows\n")
    figures = {
        "f1_micro": finite(metrics.f1_score(true, predicted, average="micro", zero_division=0)),
        "f1_macro": finite(metrics.f1_score(true, predicted, average="macro", zero_division=0)),
        "subset_accuracy": finite((true == predicted).all(axis=1).mean()),
    }
    labels = range(len(names))
    report = metrics.classification_report(
        true, predicted, labels=labels, target_names=list(names), digits=4, zero_division=0
    )
    return Scores(figures, report)


def regression_metrics(targets: np.ndarray, predicted: np.ndarray) -> Scores:
    """Numbers, (S,): Pearson's and Spearman's correlations, mean squared and mean absolute error."""
    true, given = np.asarray(targets, np.float64), np.asarray(predicted, np.float64)
    figures: Figures = {name: correlation(true, given, name) for name in ("pearson", "spearman")}
    errors = given - true
    figures["mean_squared_error"] = finite((errors**2).mean()) if len(errors) else None
    figures["mean_absolute_error"] = finite(np.abs(errors).mean()) if len(errors) else None
    return Scores(figures, in_lines(figures))


def correlation(a: np.ndarray, b: np.ndarray, kind: str) -> float | None:
    """Pearson's or Spearman's correlation; None where it is not defined: of less than two values, or of equal ones."""
    if len(a) < 2 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return None
    from scipy import stats  # half a second, which not every import of this module should take

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        found = stats.pearsonr(a, b) if kind == "pearson" else stats.spearmanr(a, b)
    return finite(found.statistic)


def in_lines(figures: Mapping[str, Any]) -> str:
    """One figure a line."""
    width = max(map(len, figures))
    shown = {name: "not defined" if value is None else f"{value:.4f}" for name, value in figures.items()}
    return "".join(f"{name:>{width}}  {value}\n" for name, value in shown.items())


# -------------------------------------------------------------------------------------------------------------- tags


def tag_metrics(targets: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> Scores:
    """Tags of words, a list for each sentence: the share of right words; and of entities precision, recall and F1.

    Entities are counted twice: as seqeval does by default and CoNLL's own script did, where I-PER after O begins one
    (`entity_...`); and as the scheme says, where it does not (`entity_..._strict`: IOB2, IOBES where tags end in E- or
    S-). F1 is over all entities. Tags that are no entities', such as parts of speech, have the figures of classes.
    """
    true, given = [list(tags) for tags in targets], [list(tags) for tags in predicted]
    flat_true, flat_given = [tag for tags in true for tag in tags], [tag for tags in given for tag in tags]
    if not all(map(is_entity_tag, (*flat_true, *flat_given))):
        names = sorted_names([*flat_true, *flat_given])
        number = {name: k for k, name in enumerate(names)}
        a, b = (np.array([number[tag] for tag in tags]) for tags in (flat_true, flat_given))
        return class_metrics(a, b, names)
    true, given = [with_ends(tags) for tags in true], [with_ends(tags) for tags in given]
    right = [a == b for a, b in zip(flat_true, flat_given, strict=True)]
    figures: Figures = {"accuracy": finite(np.mean(right)) if right else None}
    seqeval = seqeval_metrics()
    lenient, strict = (part.precision_recall_fscore_support for part in (seqeval.sequence_labeling, seqeval.v1))
    for suffix, found in (
        ("", lenient(true, given, average="micro", zero_division=0)),
        ("_strict", strict(true, given, average="micro", zero_division=0, scheme=scheme_of(true, given))),
    ):
        figures |= {f"entity_{part}{suffix}": finite(value) for part, value in zip(PARTS, found, strict=False)}
    if not any(tag != "O" for tag in (*flat_true, *flat_given)):
        return Scores(figures, "no entities, and none predicted\n")
    return Scores(figures, seqeval.classification_report(true, given, digits=4, zero_division=0))


def scheme_of(true: Sequence[Sequence[str]], given: Sequence[Sequence[str]]) -> Any:
    """seqeval's class of the scheme that tags are written in."""
    from seqeval import scheme

    letters = {tag[0] for tags in (*true, *given) for tag in tags}
    return scheme.IOBES if letters & {"E", "S"} else scheme.IOB2


# ----------------------------------------------------------------------------------------------------------- answers

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_MARKS = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces: SQuAD's official evaluate-v2.0.py."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_MARKS)).split())


def answer_exact_match(predicted: str, true: str) -> int:
    return int(normalize_answer(predicted) == normalize_answer(true))


def answer_f1(predicted: str, true: str) -> float:
    """F1 of the words that two answers share; where one has none, whether the other has none either."""
    a, b = normalize_answer(predicted).split(), normalize_answer(true).split()
    if not a or not b:
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))  # 2 p r / (p + r), p = common / |a|, r = common / |b|


def answer_metrics(targets: Sequence[Sequence[str]], predicted: Sequence[str]) -> Scores:
    """Exact match and F1 of answers, each the best over a question's right ones; none is right where there is none.

    Where some questions have an answer and some have none, the figures of each kind too, under SQuAD's names.
    """
    exact, f1 = [], []
    for answers, given in zip(targets, predicted, strict=True):
        right = right_answers(answers)
        exact.append(max(answer_exact_match(given, answer) for answer in right))
        f1.append(max(answer_f1(given, answer) for answer in right))
    has = [len(answers) > 0 for answers in targets]
    figures = means(("exact_match", exact), ("f1", f1))
    if any(has) and not all(has):
        for kind, chosen in (("HasAns", np.array(has)), ("NoAns", ~np.array(has))):
            figures |= means((f"{kind}_exact", np.array(exact)[chosen]), (f"{kind}_f1", np.array(f1)[chosen]))
    return Scores(figures, in_lines(figures))


def right_answers(answers: Sequence[str]) -> list[str]:
    """The answers of which something is left when normalised; no answer, where none is."""
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def best_null_threshold(
    targets: Sequence[Sequence[str]], best: Sequence[str], score_diffs: Sequence[float | None]
) -> tuple[float, float]:
    """The null_score_diff_threshold with the highest F1 on these questions, and that F1: SQuAD's find_best_thresh.

    `best` are the best answers whether or not they were given, `score_diffs` how much better not answering scored
    (None where there was nothing to answer). The least threshold where several are as good; below all differences where
    it is best never to answer.
    """
    gains = [
        (diff, max(answer_f1(text, right) for right in right_answers(answers)) - (not answers))
        for answers, text, diff in zip(targets, best, score_diffs, strict=True)
        if diff is not None
    ]
    score = top = float(sum(not answers for answers in targets))
    gains.sort()
    threshold = gains[0][0] - 1.0 if gains else 0.0
    for place, (diff, gain) in enumerate(gains):
        score += gain
        if score > top and (place + 1 == len(gains) or gains[place + 1][0] > diff):
            top, threshold = score, diff
    return threshold, top / max(len(targets), 1)


def means(*columns: tuple[str, Any]) -> Figures:
    return {name: finite(np.mean(values)) if len(values) else None for name, values in columns}


# -------------------------------------------------------------------------------------------------------- embeddings


def similarity_metrics(targets: np.ndarray, cosines: np.ndarray) -> Scores:
    """Scored pairs, (S,): the correlations of their cosines with the scores; Spearman's is the usual one."""
    figures: Figures = {kind: correlation(targets, cosines, kind) for kind in ("pearson", "spearman")}
    return Scores(figures, in_lines(figures))


def search_metrics(scores: np.ndarray, right: np.ndarray) -> Scores:
    """Q questions against D documents, scores (Q, D), the right document of each (Q,): what stands how high."""
    return rank_metrics(ranks(scores, right))


def ranks(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(Q,) the place of the right document, 1 the best. A document of equal score stands before the right one."""
    return np.asarray((scores >= np.take_along_axis(scores, right[:, None], axis=1)).sum(axis=1))


def rank_metrics(rank: np.ndarray) -> Scores:
    """The mean reciprocal rank and the normalised discounted gain of the first 10, and the share found among the first
    1, 5 and 10: of the place (Q,) at which each question's one right document stands.
    """
    among = rank <= 10
    figures = means(
        ("mrr_10", among / rank),
        ("ndcg_10", among / np.log2(rank + 1)),
        *((f"recall_{k}", rank <= k) for k in (1, 5, 10)),
    )
    return Scores(figures, in_lines(figures))


# ------------------------------------------------------------------------------------------------------------ groups


def by_group(groups: Sequence[str], metrics: Callable[[np.ndarray], Scores]) -> dict[str, Figures]:
    """The figures of each group of rows: `metrics` gets the numbers of a group's rows, (n,) int64."""
    column = np.array(groups, dtype=object)
    rows = {group: np.flatnonzero(column == group) for group in sorted_names(groups)}
    return {group: {"count": len(chosen), **metrics(chosen).figures} for group, chosen in rows.items()}


def group_report(figures: Mapping[str, Figures]) -> str:
    """The figures of groups as a table, the groups its rows."""
    columns = list(dict.fromkeys(name for row in figures.values() for name in row))
    width = max(map(len, figures))
    lines = [" " * width + "".join(f"  {name:>9}" for name in columns)]
    for group, row in figures.items():
        cells = [f"{cell(row.get(name)):>{max(9, len(name))}}" for name in columns]
        lines.append(f"{group:>{width}}" + "".join(f"  {text}" for text in cells))
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
