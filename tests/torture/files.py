"""Mutated files of every kind that is read here: each is read, or refused in a line; nothing else may happen.

    python -m tests.torture.files 10000 --seed 1      # as many mutants
    python -m tests.torture.files --only 1:4711       # one again, with what came of it: seed and number

A mutant is a whole file in which a few bytes, or values of its JSON, are others. It is read in a child process with
little memory and little time, so that one that hangs or kills the process is told from the others.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.torture.corpus import KINDS, make_corpus

MEMORY = 500 << 20  # bytes beyond what the process has before it
SECONDS = 5.0
NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e308, -1e-308, 10**9, 2**31, 2**32, 2**63, 2**64, 10**30, float("nan"),
    float("inf"), "", "\0", "\ud800", "x" * 3000, "../../etc/passwd", "/dev/zero", [], {}, [[]], [None], {"": None},
    [0] * 300, "é\u0301", "1e9", "[CLS]",
)  # fmt: skip
BYTES = (b"\0", b"\xff", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b"\t", b"9999999999", b"-", b"\xed\xa0\x80", b"\r")


class Failure(NamedTuple):
    """A mutant that was neither read nor refused in a line."""

    number: int
    kind: str
    file: str
    what: str


# ------------------------------------------------------------------------------------------------------------ mutating


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(data) + 1)
        end = min(len(data), place + draw.choice((1, 1, 4, 40, 4000)))
        way = draw.randrange(6)
        if way == 0 and place < len(data):
            data[place] ^= 1 << draw.randrange(8)
        elif way == 1:
            data[place:end] = b""
        elif way == 2:
            data[place:place] = draw.choice(BYTES) * draw.choice((1, 1, 3, 1000))
        elif way == 3:
            data[place:place] = data[place:end]
        elif way == 4:
            del data[place:]
        else:
            data[place:end] = draw.randbytes(min(end - place, 64))
    return bytes(data)


def mutate_json(value: Any, draw: random.Random) -> Any:
    """The same value, but one or two within it others, gone, doubled, or under another name."""
    for _ in range(draw.choice((1, 1, 2))):
        places: list[tuple[Any, Any]] = []
        collect(value, places)
        if not places:
            return draw.choice(NASTY)
        holder, key = draw.choice(places)
        way = draw.randrange(6)
        if way == 0:
            del holder[key]
        elif way == 1:
            other_holder, other_key = draw.choice(places)
            holder[key] = json.loads(json.dumps(other_holder[other_key]))
        elif way == 2 and isinstance(holder[key], int | float):
            holder[key] = draw.choice((holder[key] + 1, -holder[key], holder[key] * 1000, str(holder[key])))
        elif way == 3 and isinstance(holder, dict):
            holder[draw.choice((f"{key}x", "", "__proto__", "type", "id"))] = holder.pop(key)
        else:
            holder[key] = draw.choice(NASTY)
    return value


def collect(value: Any, places: list[tuple[Any, Any]], most: int = 4000) -> None:
    """Every place within a value of JSON: what holds it, and under which key."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        if len(places) >= most:
            return
        places.append((value, key))
        collect(each, places, most)


def mutate(path: Path, draw: random.Random) -> bytes:
    content = path.read_bytes()
    if draw.random() < 0.6:
        with contextlib.suppress(ValueError, KeyError, struct.error, UnicodeDecodeError):
            if path.suffix == ".safetensors":
                return mutate_header(content, draw)
            if path.suffix == ".json":
                return dump(mutate_json(json.loads(content), draw))
            if path.suffix == ".jsonl":
                lines = content.splitlines()
                number = draw.randrange(len(lines))
                lines[number] = dump(mutate_json(json.loads(lines[number]), draw))
                return b"\n".join(lines) + b"\n"
    return mutate_bytes(content, draw)


def mutate_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file with another header, or with other values in the JSON that its metadata hold as text."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    inner = [name for name, text in header.get("__metadata__", {}).items() if text[:1] in "[{"]
    if inner and draw.random() < 0.7:
        name = draw.choice(inner)
        header["__metadata__"][name] = dump(mutate_json(json.loads(header["__metadata__"][name]), draw)).decode()
    else:
        header = mutate_json(header, draw)
    text = dump(header)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def dump(value: Any) -> bytes:
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------------------------------------- reading


class TooLong(BaseException):
    """No Exception: what is read must not catch it."""


def outcome(read: Callable[[Path], Any], folder: Path) -> str:
    """What came of reading: "read", "refused", or what is wrong."""
    from minibert.errors import UserError

    began = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
        result = "read"
    except UserError as error:
        said = str(error)
        result = "refused" if said and "\n" not in said else f"not one line: {said!r}"
    except TooLong:
        result = f"took more than {SECONDS} s\n" + traceback.format_exc(limit=-6)
    except MemoryError:
        result = f"took more than {MEMORY >> 20} MB\n" + traceback.format_exc(limit=-6)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}\n" + traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return result if time.monotonic() - began < 2 * SECONDS else f"took {time.monotonic() - began:.0f} s"


def read_mutants(corpus: Path, seed: int, numbers: range, told: Path) -> None:
    """In a child: a line for each mutant, its number before it is read and then what came of it."""

    def give_up(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, give_up)
    with open(told, "a", encoding="utf-8") as log, tempfile.TemporaryDirectory(dir=told.parent) as scratch:
        for kind in KINDS:  # what is imported and made ready once is no mutant's
            whole = shutil.copytree(corpus / kind.name, Path(scratch) / "whole" / kind.name)
            result = outcome(kind.read, whole)
            assert result == "read", f"the whole {kind.name}: {result}"
        for number in numbers:
            print(json.dumps([number, *name_of(corpus, seed, number), None]), file=log, flush=True)
            if number % 20 == 0:  # for what does not come back to Python; arming it takes as long as a small mutant
                faulthandler.dump_traceback_later(30 * SECONDS, exit=True)
            kind, file, folder = make_mutant(corpus, seed, number, Path(scratch) / "mutant")
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, resource.RLIM_INFINITY))
            print(json.dumps([number, kind.name, file, outcome(kind.read, folder)]), file=log, flush=True)
    faulthandler.cancel_dump_traceback_later()


def chosen(corpus: Path, seed: int, number: int) -> tuple[Any, Path, random.Random]:
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choice(KINDS)
    files = sorted(path for path in (corpus / kind.name).rglob(kind.mutated) if path.is_file())
    return kind, draw.choice(files), draw


def name_of(corpus: Path, seed: int, number: int) -> tuple[str, str]:
    kind, path, _ = chosen(corpus, seed, number)
    return kind.name, path.name


def make_mutant(corpus: Path, seed: int, number: int, folder: Path) -> tuple[Any, str, Path]:
    kind, path, draw = chosen(corpus, seed, number)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(corpus / kind.name, folder)
    target = folder / path.relative_to(corpus / kind.name)
    target.write_bytes(mutate(path, draw))
    return kind, path.name, folder


# ------------------------------------------------------------------------------------------------------------- running


def torture(count: int, seed: int = 1, folder: Path | None = None) -> tuple[dict[str, int], list[Failure]]:
    """How many of `count` mutants were read and refused; and those of which something else came."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        corpus, told = Path(name) / "corpus", Path(name) / "told.jsonl"
        make_corpus(corpus)
        counts = {"read": 0, "refused": 0}
        failures: list[Failure] = []
        begin = 0
        while begin < count:
            told.write_text("")
            command = [sys.executable, "-m", "tests.torture.files", str(count), "--seed", str(seed)]
            command += ["--child", str(corpus), str(told), "--from", str(begin)]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            last: dict[int, Failure] = {}
            for line in told.read_text(encoding="utf-8").splitlines():
                told_of = Failure(*json.loads(line))
                last[told_of.number] = told_of
            if not last:
                raise RuntimeError(f"the child did not begin: {done.stderr[-3000:]}")
            for each in last.values():
                if each.what in counts:
                    counts[each.what] += 1
                else:
                    ended = f"the process ended ({done.returncode}): {done.stderr[:1500]}"
                    failures.append(each._replace(what=each.what or ended))
            begin = max(last) + 1
        return counts, failures


def show(corpus: Path, seed: int, number: int) -> str:
    """What comes of one mutant, without a child."""
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TooLong()))
    kind, file, folder = make_mutant(corpus, seed, number, corpus.with_name("mutant"))
    print(kind.name, file, (folder / file).read_bytes()[:3000] if (folder / file).is_file() else "")
    return outcome(kind.read, folder)


@contextlib.contextmanager
def whole_corpus() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        make_corpus(Path(name) / "corpus")
        yield Path(name) / "corpus"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture.files", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", type=int, nargs="?", default=10_000, help="mutants")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", metavar="SEED:NUMBER", help="one mutant, and what comes of it")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--from", dest="begin", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # a thread's stack is no mutant's memory
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if given.child:
        corpus, told = map(Path, given.child)
        read_mutants(corpus, given.seed, range(given.begin, given.count), told)
        return 0
    if given.only:
        seed, number = map(int, given.only.split(":"))
        with whole_corpus() as corpus:
            print(show(corpus, seed, number))
        return 0
    began = time.monotonic()
    counts, failures = torture(given.count, given.seed)
    for failure in failures:
        print(f"{given.seed}:{failure.number} {failure.kind} {failure.file}: {failure.what}\n")
    told = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"{given.count} mutants in {time.monotonic() - began:.0f} s: {told}, {len(failures)} otherwise")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
