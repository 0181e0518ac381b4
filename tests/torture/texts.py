"""Long texts: seconds and memory of reading one, of training a vocabulary on it and of encoding it.

    python -m tests.torture texts --megabytes 10

Each in a process of its own. It is a fault where it takes more than 50 times the text, and more than 100 MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {
    "prose in one line": "The hill is steep, and the cat sat on it; ",
    "prose in lines": "The hill is steep, and the cat sat on it.\n",
    "one word": "a",
    "Chinese without a full stop": "中文字",
}
WORKS = {
    "read": "read_documents(path)",
    "a vocabulary trained": "train_tokenizer(read_documents(path), 200)",
    "encoded": "encode(read_documents(path), tokenizer)",
}
CHILD = """
import json, resource, sys, time
from minibert.data import SHIPPED_VOCABULARY, encode, load_tokenizer, read_documents, train_tokenizer
tokenizer, path = load_tokenizer(SHIPPED_VOCABULARY), sys.argv[1]
train_tokenizer([["a text"]], 30)  # all code is loaded
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before, began = peak(), time.perf_counter()
{work}
print(json.dumps([time.perf_counter() - began, peak() - before]))
"""
MOST, LEAST = 50, 100e6


def main(arguments: list[str]) -> int:
    """The table; exit code 1 where one took too much memory."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture texts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=float, default=10.0, help="bytes of each text, in millions")
    size = parser.parse_args(arguments).megabytes * 1e6
    faults = 0
    print(f"| {size / 1e6:g} MB of text | | seconds | peak memory above the process's own |\n| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for kind, unit in KINDS.items():
            path = Path(folder) / "text.txt"
            path.write_text(unit * int(size / len(unit.encode())), encoding="utf-8")
            for name, work in WORKS.items():
                command = [sys.executable, "-c", CHILD.format(work=work), str(path)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, memory = json.loads(done.stdout)
                faults += memory > max(MOST * size, LEAST)
                print(f"| {kind} | {name} | {seconds:.1f} | {memory / 1e6:,.0f} MB |", flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
