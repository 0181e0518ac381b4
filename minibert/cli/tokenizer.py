"""`minibert tokenizer train` and `minibert tokenizer show`."""

from __future__ import annotations

from pathlib import Path

import typer

from minibert.cli import app
from minibert.cli.inputs import SEPARATOR_HELP
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer, read_documents, save_tokenizer, train_tokenizer
from minibert.data.text import TWO_BLANK_LINES
from minibert.data.tokenizer import FILES
from minibert.errors import UserError
from minibert.model.checkpoint import OTHER_WEIGHTS

commands = typer.Typer(help="Train a WordPiece vocabulary, or see how one cuts a text.", no_args_is_help=True)
app.add_typer(commands, name="tokenizer")


@commands.command("train")
def train(
    texts: list[Path] = typer.Argument(metavar="TEXT...", help="Plain text files, UTF-8."),
    output: Path = typer.Option(..., help="Folder for tokenizer.json, vocab.txt and tokenizer_config.json."),
    vocab_size: int = typer.Option(8000, min=6, max=1_000_000, help="Tokens at most, the special ones among them."),
    cased: bool = typer.Option(False, "--cased", help="Keep upper case and accents."),
    document_separator: str = typer.Option(TWO_BLANK_LINES, metavar="WHAT", help=SEPARATOR_HELP),
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace a vocabulary in --output; never a model's."),
) -> None:
    """Train a WordPiece vocabulary on text files."""
    refuse_to_overwrite(output, overwrite)
    tokenizer = train_tokenizer(read_documents(texts, document_separator), vocab_size, lowercase=not cased)
    save_tokenizer(tokenizer, output)
    print(f"{tokenizer.get_vocab_size()} tokens in {output}")


def refuse_to_overwrite(output: Path, overwrite: bool) -> None:
    """A vocabulary may be replaced when that is wished; under weights never: they mean nothing without theirs."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    names = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    weights = [name for name in names if OTHER_WEIGHTS.keys() & set(Path(name).suffixes)]
    if weights:
        raise UserError(
            f"--output {output} holds a model, {weights[0]}, that another vocabulary would spoil: name another folder"
        )
    held = [name for name in FILES if name in names]
    if held and not overwrite:
        raise UserError(f"--output {output} holds a vocabulary, {held[0]}: add --overwrite, or name another folder")


@commands.command("show")
def show(
    text: str = typer.Argument(help="The text itself."),
    tokenizer: Path = typer.Option(SHIPPED_VOCABULARY, show_default="the shipped one", help="Folder or file."),
) -> None:
    """Show the tokens of a text, each with its id."""
    if text.encode("utf-8", "ignore").decode() != text:
        raise UserError(f"expected a text in UTF-8, got {text!a}: convert it, or set the terminal to UTF-8")
    encoding = load_tokenizer(tokenizer).encode(text)
    print(" ".join(f"{token}:{number}" for token, number in zip(encoding.tokens, encoding.ids, strict=True)))
