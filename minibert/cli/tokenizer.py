"""`minibert tokenizer train` and `minibert tokenizer show`."""

from __future__ import annotations

from pathlib import Path

import typer

from minibert.cli import app
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer, read_documents, save_tokenizer, train_tokenizer
from minibert.errors import UserError

commands = typer.Typer(help="Train a WordPiece vocabulary, or see how one cuts a text.", no_args_is_help=True)
app.add_typer(commands, name="tokenizer")


@commands.command("train")
def train(
    texts: list[Path] = typer.Argument(metavar="TEXT...", help="Plain text files, UTF-8."),
    output: Path = typer.Option(..., help="Folder for tokenizer.json, vocab.txt and tokenizer_config.json."),
    vocab_size: int = typer.Option(8000, min=6, max=1_000_000, help="Tokens at most, the special ones among them."),
    cased: bool = typer.Option(False, "--cased", help="Keep upper case and accents."),
) -> None:
    """Train a WordPiece vocabulary on text files."""
    tokenizer = train_tokenizer(read_documents(texts), vocab_size, lowercase=not cased)
    try:
        save_tokenizer(tokenizer, output)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise UserError(f"cannot write into {output}: {error}; choose another --output") from None
    print(f"{tokenizer.get_vocab_size()} tokens in {output}")


@commands.command("show")
def show(
    text: str = typer.Argument(help="The text itself."),
    tokenizer: Path = typer.Option(SHIPPED_VOCABULARY, show_default="the shipped one", help="Folder or file."),
) -> None:
    """Show the tokens of a text, each with its id."""
    encoding = load_tokenizer(tokenizer).encode(text)
    print(" ".join(f"{token}:{number}" for token, number in zip(encoding.tokens, encoding.ids, strict=True)))
