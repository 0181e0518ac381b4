"""Which column of a table is the text, its pair, its label: as named, or guessed from the names and said in one line.

Names are compared without capitals, spaces or hyphens. A guess is made where one name of the first list that fits is
there, or where one column is left over; never from the values. Else it is a UserError that lists the columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from minibert.errors import UserError

PAIRS = (
    ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("text1", "text2"), ("text_1", "text_2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"),
    ("question", "sentence"), ("query", "passage"), ("query", "document"), ("#1_string", "#2_string"),
)  # fmt: skip
SEARCH_PAIRS = (
    ("anchor", "positive"), ("query", "positive"), ("question", "positive"), ("question", "answer"),
    ("query", "answer"), ("query", "response"),
)  # fmt: skip
TEXTS = (
    ("text", "sentence"),
    (
        *("review", "content", "body", "message", "comment", "tweet", "document", "utterance", "question", "query"),
        *("post", "sms", "article", "email"),
    ),
    ("title", "headline", "summary", "description", "subject"),
)
CLASSES = (
    ("label", "labels"),
    ("class", "category", "categories", "target", "sentiment", "topic", "topics", "intent", "genre", "genres", "tags"),
    ("gold_label", "is_duplicate", "quality"),
    ("score", "rating", "stars", "grade"),
)
SCORES = (
    ("label", "labels"),
    ("score", "target", "rating", "stars", "similarity", "value", "grade", "mean", "y", "relatedness_score"),
)
LABEL_NAMES = {name for tier in CLASSES + SCORES for name in tier}
LABELS = {"classify": CLASSES, "regress": SCORES, "embed": SCORES}
OPTIONS = {"text": "--text-column", "pair": "--pair-column", "negative": "--negative-column", "label": "--label-column"}
NO_TEXT = {"id", "idx", "index", "uid", "guid", "column_1"}  # the last: an index that pandas wrote without a name


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read. `unread` are the others."""

    text: str
    pair: str | None = None
    label: str | None = None
    negative: str | None = None
    unread: tuple[str, ...] = ()

    @property
    def note(self) -> str:
        """One sentence that says what was taken for what: "text: column 'review', label: column 'stars'"."""
        taken = {"text": self.text, "pair": self.pair, "negative": self.negative, "label": self.label}
        note = ", ".join(f"{part}: column {name!r}" for part, name in taken.items() if name is not None)
        return note + (f"; not read: {listed(self.unread)}" if self.unread else "")


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names in quotes, the first of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name) for name in names[:most]) + more


def find_columns(
    available: Sequence[str],
    where: str,
    task: str,
    *,
    text: str | None = None,
    pair: str | None = None,
    label: str | None = None,
    negative: str | None = None,
    labelled: bool = True,
) -> Columns:
    """The columns for a task (classify, regress, embed) among those `available` in the file `where`.

    What is named is taken, the rest guessed; without `labelled` no label is looked for. embed needs a pair, and takes
    a label (a score of likeness) only where one is named or guessed beside no negative. Raises UserError where a name
    is not there, is given twice, or no guess is sure.
    """
    taken = {"text": text, "pair": pair, "label": label, "negative": negative}
    check_named(taken, available, where)
    left = [name for name in available if name not in taken.values()]

    def guess(part: str, *tiers: Sequence[str]) -> None:
        if taken[part] is None and (name := by_name(left, tiers, where, part, available)) is not None:
            taken[part] = name
            left.remove(name)

    if text is None:
        for first, second in pairs_for(task):
            names = set(map(plain, left))
            if first in names and (second in names if pair is None else second == plain(pair)):
                guess("text", [first])
                guess("pair", [second])
                break
    parts = ["text"]
    if task == "embed":
        parts.append("pair")
        guess("negative", ["negative"])
        if labelled and taken["negative"] is None:
            guess("label", *SCORES)
    elif labelled:
        parts.append("label")
        guess("label", *LABELS[task])
    guess("text", *TEXTS)

    missing = [part for part in parts if taken[part] is None]
    spare = [name for name in left if plain(name) not in NO_TEXT and (labelled or plain(name) not in LABEL_NAMES)]
    spare = spare if spare or labelled else left  # a single column is the text, whatever its name
    if missing and (len(missing) != len(spare) or missing == ["text", "label"]):
        raise UserError(
            f"{where}: which column is the {missing[0]}? Its columns, as the first line names them, are "
            f"{listed(available)}: name one with {OPTIONS[missing[0]]}"
        )
    taken |= dict(zip(missing, spare, strict=False))  # two texts in the order of their columns
    taken["label"] = taken["label"] if labelled else None
    unread = tuple(name for name in available if name not in taken.values())
    return Columns(str(taken["text"]), taken["pair"], taken["label"], taken["negative"], unread)


def check_named(named: Mapping[str, str | None], available: Sequence[str], where: str) -> None:
    """Raises UserError for a column that is not there, or is named for two things."""
    names = [name for name in named.values() if name is not None]
    for part, name in named.items():
        if name is not None and name not in available:
            near = get_close_matches(name, available, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{where} has no column {name!r} ({OPTIONS[part]}): its columns are {listed(available)}{hint}"
            )
        if name is not None and names.count(name) > 1:
            raise UserError(f"{where}: the column {name!r} is named for two things: name another for one of them")


def plain(name: str) -> str:
    """A name as it is compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def pairs_for(task: str) -> Sequence[tuple[str, str]]:
    return (*SEARCH_PAIRS, *PAIRS) if task == "embed" else PAIRS


def by_name(
    left: Sequence[str], tiers: Iterable[Sequence[str]], where: str, part: str, available: Sequence[str]
) -> str | None:
    """The column whose name is in the first list that has any. Raises UserError where two are."""
    for tier in tiers:
        found = [name for name in left if plain(name) in tier]
        if len(found) > 1:
            raise UserError(
                f"{where}: {listed(found)} could each be the {part}; its columns are {listed(available)}: name one "
                f"with {OPTIONS[part]}"
            )
        if found:
            return found[0]
    return None
