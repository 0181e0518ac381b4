"""The command line: `minibert COMMAND`. Each module here adds its commands to `app`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import typer

from minibert import __version__
from minibert.backends import BackendUnavailable
from minibert.errors import Interrupted, UserError, pip_install

# A wrong option or argument, in whichever library this release of typer raises it from: click, or its own copy of it.
UsageMistake: Any = typer.BadParameter.__mro__[2]

# The modules here that add commands to `app`.
COMMANDS = (
    "bisect", "build", "check", "compare", "diff", "embed", "fill_mask", "finetune", "predict", "pretrain", "quantize",
    "search", "tables", "tokenizer", "watch",
)  # fmt: skip

app = typer.Typer(
    name="minibert",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"minibert {__version__}")
        raise typer.Exit


@app.callback()
def minibert(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """A BERT written from the ground up, compared op by op across backends."""


MISTAKES = (UserError, BackendUnavailable, MemoryError, ModuleNotFoundError)  # that a user can mend


def in_one_line(error: BaseException) -> str:
    """What went wrong and what to do. Raises an error that is no user's to mend: a module of our own is missing."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in ("", "minibert", "bench"):
            raise error
        return f"{package} is not installed: {pip_install(package)}"
    return str(error) or "out of memory"


def register_commands(asked: str = "") -> None:
    """Import what has commands, or the one that is asked for: all of them take most of a second."""
    name = asked.replace("-", "_")
    for module in [name] if name in COMMANDS else COMMANDS:
        import_module(f"minibert.cli.{module}")


def main() -> None:
    """Run a command. A mistake is one line on stderr and exit code 2; what cannot be written, 1; an interrupt, 130."""
    register_commands(*sys.argv[1:2])
    from minibert.cli.options import refuse_repeated
    from minibert.cli.signals import handled

    for stream in (sys.stdout, sys.stderr):  # a path or a token that the terminal cannot show must not stop a command
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        refuse_repeated(sys.argv[1:])
        with handled():
            status = app(standalone_mode=False)
            sys.stdout.flush()  # a full disk shows here, where it can be told
    except UsageMistake as error:
        if error.format_message():
            print(f"error: {error.format_message()}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # who read standard output has enough of it, as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Interrupted as stop:
        print(f"stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that was removed: the machine's, wherever it comes from
        print(f"error: {error}: make room, or put right what is named, and run it again", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # which may hold what cannot be written
        sys.exit(1)
    except MISTAKES as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(status if isinstance(status, int) else 0)
