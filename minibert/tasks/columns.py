"""Which column of a table is the text, its pair, its label: as named, or guessed from the names and said in one line.

Names are compared without capitals, spaces or hyphens. A guess is made where one name of the first list that fits is
there, or where one column is left over; never from the values. Else it is a UserError that lists the columns.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    given = {"text": text, "pair": pair, "label": label, "negative": negative}
    for part, name in given.items():
        if name is not None and name not in available:
            near = get_close_matches(name, available, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"{where} has no column {name!r} ({OPTIONS[part]}): its columns are {listed(available)}{hint}"
            )
    named = [name for name in given.values() if name is not None]
    if len(set(named)) < len(named):
        raise UserError(f"{where}: the column {max(named, key=named.count)!r} is named for two things: name another")

    left = {plain(name): name for name in available if name not in named}
    taken = dict(given)

    def take(part: str, key: str | None) -> None:
        if taken[part] is None and key is not None:
            taken[part] = left.pop(key, None)

    if text is None:
        for part, key in zip(("text", "pair"), pair_by_name(left, pair, task), strict=True):
            take(part, key)
    parts = ["text"]
    if task == "embed":
        parts.append("pair")
        take("negative", "negative")
        if taken["negative"] is None and labelled:
            take("label", by_name(left, SCORES, where, "label", available) if label is None else None)
    elif labelled:
        parts.append("label")
        take("label", by_name(left, LABELS[task], where, "label", available) if label is None else None)
    take("text", by_name(left, TEXTS, where, "text", available) if taken["text"] is None else None)

    missing = [part for part in parts if taken[part] is None]
    spare = [
        key for key in left if key not in NO_TEXT and (labelled or not any(key in tier for tier in CLASSES + SCORES))
    ]
    spare = spare if spare or labelled else list(left)  # a single column is the text, whatever its name
    if missing and (len(missing) != len(spare) or missing == ["text", "label"]):
        raise UserError(
            f"{where}: which column is the {missing[0]}? Its columns, as the first line names them, are "
            f"{listed(available)}: name one with {OPTIONS[missing[0]]}"
        )
    for part, key in zip(missing, spare, strict=False):  # two texts in the order of their columns
        take(part, key)
    used = {part: name for part, name in taken.items() if labelled or part != "label"}
    unread = tuple(name for name in available if name not in used.values())
    return Columns(str(used["text"]), used.get("pair"), used.get("label"), used.get("negative"), unread)


def plain(name: str) -> str:
    """A name as it is compared."""
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def pair_by_name(left: dict[str, str], pair: str | None, task: str) -> tuple[str | None, str | None]:
    """The first known pair of names that is there, or that goes with the second one's name `pair`."""
    for a, b in (*SEARCH_PAIRS, *PAIRS) if task == "embed" else PAIRS:
        if a in left and (b in left if pair is None else b == plain(pair)):
            return a, b
    return None, None


def by_name(
    left: dict[str, str], tiers: Sequence[Sequence[str]], where: str, part: str, available: Sequence[str]
) -> str | None:
    """The name that is there of the first list that has any. Raises UserError where two are."""
    for tier in tiers:
        found = [name for name in tier if name in left]
        if len(found) > 1:
            raise UserError(
                f"{where}: {listed([left[name] for name in found])} could each be the {part}; its columns are "
                f"{listed(available)}: name one with {OPTIONS[part]}"
            )
        if found:
            return found[0]
    return None
