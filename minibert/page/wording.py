"""Numbers and findings in words: what a reader takes away from each part of the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from minibert.lab.measure.quiet import load_words
from minibert.page.facts import STEP, Facts, mapping, number, numbers

MISSING = "–"
UNAVAILABLE = "unavailable"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
ALMOST = 0.9995  # from here on three digits round up to 1
LONGEST_NAME = 34  # characters


class Headline(NamedTuple):
    """The page's first sentence, with the number that stands out of it, and the line below."""

    before: str
    figure: str
    after: str
    below: str


def significant(value: float | None, digits: int = 3) -> str:
    """A number in so many digits and no more; powers of ten where it is very large or small."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    power = int(f"{value:.{digits - 1}e}".partition("e")[2])
    if -4 < power < 6:
        return f"{value:,.{max(digits - 1 - power, 0)}f}"
    mantissa, _, exponent = f"{value:.{min(digits - 1, 1)}e}".partition("e")
    return f"{mantissa}×{power_of_ten(int(exponent))}"


def brief(name: str) -> str:
    """A name for a figure, which has little room."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def power_of_ten(power: int) -> str:
    return "10" + str(power).translate(SUPERSCRIPTS)


def power_of_two(power: int) -> str:
    return "2" + str(power).translate(SUPERSCRIPTS)


def whole(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}"


def milliseconds(value: float | None, digits: int = 3) -> str:
    if value is None:
        return MISSING
    for unit, size in (("s", 1e3), ("ms", 1.0)):
        if value >= size * ALMOST:
            return f"{significant(value / size, digits)} {unit}"
    return f"{significant(value * 1e3, digits)} µs"


def megabytes(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{significant(value / 1e9)} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def percent(value: float | None) -> str:
    """Rounded down near 100, so that nothing looks as if it had reached its limit which has not; from 10 on, times."""
    if value is None:
        return MISSING
    if value >= 10:
        return f"{significant(value)}×"
    if 0.999 <= value < 1:
        return f"{math.floor(value * 1e4) / 100:.2f}%"
    return f"{value * 100:.1f}%" if value >= 0.001 or not value else f"{significant(value * 100)}%"


def times(ratio: float) -> str:
    return f"{significant(ratio)}×"


def count(amount: int, what: str) -> str:
    return f"{amount} {what}" if amount == 1 else f"{amount} {what}s"


def sentence(text: str) -> str:
    """Words that begin with a small letter and have no full stop, as one."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def joined(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def headline(facts: Facts) -> Headline:
    """The verdict, and the largest number there is: how much faster, else how near to the bound."""
    ops, judged = {row.op for row in facts.ops}, sum(int(row.judged or 0) for row in facts.ops)
    worst = max(facts.ops, key=lambda row: row.severity, default=None)
    names = [b.name for b in facts.backends]
    bad = [row for row in facts.ops if not row.ok]
    if bad or not facts.ok:
        wrong = joined(sorted({f"{row.op} on {row.backend}" for row in bad})) or "the comparison"
        return Headline("", wrong, " " + ("leave" if len(bad) > 1 else "leaves") + " the error bound of the formula.",
                        f"{count(len(ops), 'op')} on {joined(names)}; {judged} calls judged.")  # fmt: skip
    below = (
        f"{count(len(ops), 'op')} on {joined(names)}: all {judged} judged calls are within the bound of their formula."
    )
    apart = facts.largest_distance("loss")
    if apart is not None:
        below += f" Losses are within {significant(apart, 2)} of each other." if apart else " Losses are equal."
    other = facts.fastest()
    if other is not None:
        reference, turned = facts.timed[0].name, facts.ratio(facts.timed[0].name, other.name)
        slower = other.times.median < 1 and turned is not None
        ratio = turned if slower and turned is not None else other.times
        below += (
            f" The {times(ratio.median)} is the median of {count(facts.timed_steps, 'step')} taken in turns "
            f"(p20 {times(ratio.p20)}, p80 {times(ratio.p80)}), at {load_words(facts.disturbance)}."
        )
        return Headline(
            f"{other.name} trains the same BERT as {reference}, and {'takes' if slower else 'is'} ",
            times(ratio.median), " as long." if slower else " as fast.", below,
        )  # fmt: skip
    speeds = {b.name: ms for b in facts.timed if (ms := facts.step_ms(b.name))}
    reference = names[0] if names else ""
    if speeds and len(names) == 1:
        return Headline(
            f"A training step on {reference} takes ", milliseconds(speeds[reference]), " a sequence.", below
        )
    if worst is None or worst.bound_share is None:
        return Headline("", "Nothing", " was compared.", "The document holds no ops.")
    before = f"{joined(names)} compute the same BERT. The largest error is "
    below = f"It is that of {worst.op} on {worst.backend}. {below}"
    return Headline(before, percent(worst.bound_share), " of its bound.", below)


def about_stages(facts: Facts) -> str:
    said = []
    for b in facts.timed:
        step = facts.step_ms(b.name)
        parts = {name: row.ms for name in STEP if (row := facts.stage(name, b.name)) is not None and row.ms is not None}
        if step and parts:
            longest = max(parts, key=lambda n: parts[n])
            said.append(
                f"{b.name} trains a sequence in {milliseconds(step)}, {parts[longest] / step:.0%} of it {longest}"
            )
    return "; ".join(said) + "." if said else ""


def gain(facts: Facts, stage: str = "") -> tuple[str, str]:
    """How many times as fast as the first the fastest other is, in a stage or a training step; and from p20 to p80."""
    other = facts.fastest(stage)
    if other is None:
        return MISSING, ""
    return times(other.times.median), f"{significant(other.times.p20)}–{significant(other.times.p80)}"


def about_roof(facts: Facts) -> str:
    shares = {b.name: share for b in facts.timed if (share := facts.roof_share(b.name)) is not None}
    if not shares:
        return ""
    whole = "; ".join(f"{name}'s step runs at {share:.0%} of what its machine allows" for name, share in shares.items())
    near = [row for row in facts.ops if row.limit_share is not None and row.limit_share <= 1 and (row.flops or 0) > 0]
    best = max(near, key=lambda row: row.limit_share or 0.0, default=None)
    said = f"{whole}."
    if best is not None:
        said += f" Nearest to its roof: {best.op} on {best.backend}, {percent(best.limit_share)}."
    return said


def about_errors(facts: Facts) -> str:
    worst = max(facts.ops, key=lambda row: row.severity, default=None)
    if worst is None:
        return ""
    far = "not finite" if worst.bound_share is None else f"{percent(worst.bound_share)} of its bound"
    inside = sum(row.ok for row in facts.ops)
    return (
        f"{'All' if inside == len(facts.ops) else f'{inside} of'} {count(len(facts.ops), 'result')} are within the "
        "bound that the op's own formula implies, whatever the order of its sums. "
        f"{'Nearest to it' if worst.ok else 'Worst'}: {worst.op} on {worst.backend}, {far}."
    )


def about_losses(facts: Facts) -> str:
    loss, weights = facts.largest_distance("loss"), facts.largest_distance("weights")
    steps = max((len(values) for values in facts.losses.values()), default=0)
    if loss is None or weights is None:
        return ""
    return (
        f"After {count(steps, 'step')} from the same weights, losses are at most {significant(loss, 2)} apart "
        f"(relative), weights {significant(weights, 2)}."
    )


def left_out(scaling: Mapping[str, Any]) -> list[str]:
    """Of which sizes there is no figure, and why."""
    said = []
    for axis, found in mapping(scaling.get("axes")).items():
        facts = mapping(found)
        said += [f"{axis} was refused: {facts['refused']}."] if facts.get("refused") else []
        said += [f"{axis} without {name}: {why}." for name, why in mapping(facts.get("left_out")).items()]
        for name, curve in mapping(facts.get("backends")).items():
            sizes = [f"{size:g}" for size in numbers(mapping(curve).get("impossible"))]
            said += [f"{axis} {', '.join(sizes)} on {name}: above the machine's peak, so impossible."] if sizes else []
    return said


def place_words(machine: Mapping[str, Any]) -> str:
    """A machine in one line."""
    cores = number(machine.get("cores"))
    core = str(machine.get("processor") or machine.get("system") or "")
    where = " on ".join(filter(None, [str(machine.get("device") or ""), core]))
    return ", ".join(filter(None, [where, count(round(cores), "core") if cores else ""])) or "machine not recorded"


def date_words(value: Any) -> str:
    """A date as it was written, without what nobody reads."""
    text = str(value or "").replace("T", " ").removesuffix("+00:00").removesuffix("Z")
    return f"{text[:16]} UTC" if len(text) >= 16 else text or "date not recorded"


class Spent(NamedTuple):
    """Energy and cost of one backend, or why there is none."""

    backend: str
    colour: int
    joules: str
    per_token: str  # millijoules
    source: str
    cost: str
    basis: str


def spent(facts: Facts) -> list[Spent]:
    """A row for each backend. What was not read is said to be unavailable, with the reason, and never guessed."""
    energy, cost = mapping(facts.document.get("energy")), mapping(facts.document.get("cost"))
    tokens, found = number(facts.config.get("tokens")), []
    for b in facts.backends:
        joules = None if b.emulated else number(mapping(energy.get("joules_per_step")).get(b.name))
        per_token = None if joules is None or not tokens else joules / tokens
        price = {} if b.emulated else mapping(cost.get(b.name))
        amount = number(price.get("per_million_tokens"))
        why = "plays another machine" if b.emulated else str(energy.get("why") or "not measured")
        no_price = "plays another machine" if b.emulated else str(price.get("unavailable") or "no price given")
        found.append(
            Spent(
                b.name, b.colour,
                UNAVAILABLE if joules is None else f"{significant(joules)} J",
                MISSING if per_token is None else f"{significant(per_token * 1e3)} mJ",
                why if joules is None else str(energy.get("source") or ""),
                UNAVAILABLE if amount is None else f"{significant(amount)} {price.get('currency', '')}".strip(),
                no_price if amount is None else str(price.get("basis") or ""),
            )
        )  # fmt: skip
    return found


def unspent(facts: Facts) -> list[tuple[str, str]]:
    """What of energy and cost no backend has, and why."""
    found, shown = spent(facts), []
    if all(row.joules == UNAVAILABLE for row in found):
        shown.append(("energy of a step", "; ".join(dict.fromkeys(row.source for row in found))))
    if all(row.cost == UNAVAILABLE for row in found):
        shown.append(("cost of tokens", "; ".join(dict.fromkeys(row.basis for row in found))))
    return [(what, f"{UNAVAILABLE}: {why}" if why else UNAVAILABLE) for what, why in shown]
