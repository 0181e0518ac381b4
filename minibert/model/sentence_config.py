"""What makes an encoder one of sentences, and the files of sentence-transformers that say it.

    modules.json                        the encoder, the pooling and the normalisation, each with its folder
    1_Pooling/config.json               how the tokens of a text become one vector
    sentence_bert_config.json           max_seq_length, do_lower_case
    config_sentence_transformers.json   prompts, how vectors are compared

Written is the form that every release of sentence-transformers reads; that of release 6 is read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from minibert.errors import UserError, path_of, warn
from minibert.model.checkpoint import AnyPath, make_folder, read_config, read_json, write_atomically
from minibert.model.config import BertConfig

MODULES, ABOUT, LENGTHS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
POOLING = "1_Pooling"
# Keys of 1_Pooling/config.json up to release 5, each true or false -> what release 6 calls pooling_mode.
MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
POOLINGS = ("mean", "cls")
SIMILARITIES = ("cosine", "dot")


@dataclass(frozen=True)
class SentenceConfig:
    """How an encoder's tokens become the vector of a text. Raises UserError for what is not known here."""

    pooling: str = "mean"  # of all tokens, or "cls": the first
    normalize: bool = False  # to length 1, so that a product is a cosine
    max_seq_length: int | None = None  # tokens of a text, [CLS] and [SEP] among them; None: the encoder's positions
    do_lower_case: bool = False  # texts, before the tokenizer
    prompts: Mapping[str, str] = field(default_factory=dict)  # what is put before a text, by name
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    others: Mapping[str, Any] = field(default_factory=dict)  # of config_sentence_transformers.json: written back

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling: expected {' or '.join(POOLINGS)}, got {self.pooling!r}")
        if self.similarity_fn_name not in SIMILARITIES:
            raise UserError(
                f"similarity_fn_name: expected {' or '.join(SIMILARITIES)}, got {self.similarity_fn_name!r}"
            )
        self.prompt(self.default_prompt_name)

    def prompt(self, name: str | None) -> str:
        """What stands before a text under that name; "" for None. Raises UserError for a name that is not there."""
        if name is None:
            return ""
        if name not in self.prompts:
            raise UserError(f"no prompt is called {name!r}: there are {', '.join(self.prompts) or 'none'}")
        return self.prompts[name]

    def as_read(self, text: str, prompt: str) -> str:
        """A text as the tokenizer gets it."""
        text = prompt + text
        return text.lower() if self.do_lower_case else text

    def __str__(self) -> str:
        return f"{self.pooling} pooling, {'normalised' if self.normalize else 'not normalised'}"


class SentenceFolder(NamedTuple):
    """What a folder says, and where in it the encoder and its tokenizer are."""

    sentence_config: SentenceConfig
    config: BertConfig
    encoder: Path


# ---------------------------------------------------------------------------------------------------------- reading


def read_sentence_folder(
    folder: AnyPath, *, pooling: str | None = None, normalize: bool | None = None
) -> SentenceFolder:
    """Read the configs in a folder; `pooling` and `normalize` count before what they say.

    Without modules.json mean pooling and no normalisation are assumed, which a warning says, unless both are given.
    Raises UserError, one line that names the file, for one that is missing or broken and for what is not known here: a
    module, a way to pool, vectors of another length than the encoder's.
    """
    folder = Path(folder)
    options: dict[str, Any] = {"pooling": pooling, "normalize": normalize}
    given = {name: value for name, value in options.items() if value is not None}
    encoder = encoder_folder(folder)
    config = read_config(encoder)
    if (folder / MODULES).is_file():
        found = _as_modules_say(folder, config.hidden_size)
    else:
        found = SentenceConfig()
        if len(given) < 2:
            assumed = str(replace(found, **given))
            warn(f"{folder} has no {MODULES}: assumed is {assumed}; give pooling and normalize to say otherwise")
    lengths = _read(encoder / LENGTHS, {"max_seq_length": (int, type(None)), "do_lower_case": bool})
    if lengths.get("transformer_task", "feature-extraction") != "feature-extraction":
        raise UserError(f"{encoder / LENGTHS}: transformer_task {lengths['transformer_task']!r} is not known here")
    length = lengths.get("max_seq_length")
    if length is None:
        length = _read(encoder / "tokenizer_config.json", {}).get("model_max_length")
    if length is not None and (not isinstance(length, int | float) or isinstance(length, bool) or length < 3):
        raise UserError(f"{encoder}: expected a max_seq_length of 3 tokens or more, got {length!r}: correct it")
    about = _read(folder / ABOUT, {"prompts": dict, "default_prompt_name": (str, type(None))})
    prompts, default = about.pop("prompts", {}), about.pop("default_prompt_name", None)
    if not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{folder / ABOUT}: expected prompts to be texts: correct them")
    try:
        found = replace(
            found, prompts=prompts, default_prompt_name=default, do_lower_case=lengths.get("do_lower_case", False),
            max_seq_length=None if length is None else int(min(length, config.max_position_embeddings)),
            similarity_fn_name=about.pop("similarity_fn_name", None) or "cosine", others=about,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{folder / ABOUT}: {error}") from None
    return SentenceFolder(replace(found, **given), config, encoder)


def encoder_folder(folder: AnyPath) -> Path:
    """Where in a folder of sentence-transformers the encoder and its tokenizer are: most often the folder itself."""
    modules = path_of(folder, "a folder with an encoder") / MODULES
    return modules.parent / _modules(modules)[0][1] if modules.is_file() else modules.parent


def _as_modules_say(folder: Path, hidden_size: int) -> SentenceConfig:
    kinds, paths = zip(*_modules(folder / MODULES), strict=True)
    if kinds not in (("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize")):
        raise UserError(
            f"{folder / MODULES} lists {', '.join(kinds)}: expected Transformer, Pooling and perhaps Normalize, the "
            "modules that are known here"
        )
    path = folder / paths[1] / "config.json"
    about = read_json(path)
    modes = about.get("pooling_mode") or [mode for key, mode in MODES.items() if about.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        said = " and ".join(map(str, modes)) if isinstance(modes, list) else modes
        raise UserError(f"{path}: pooling by {said} is not known here: expected {' or '.join(POOLINGS)}")
    if about.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt is false: pooling without the prompt's tokens is not known here")
    size = about.get("embedding_dimension", about.get("word_embedding_dimension"))
    if size not in (None, hidden_size):
        raise UserError(f"{path}: vectors of {size} numbers, but the encoder's have {hidden_size}: whose file is it?")
    return SentenceConfig(modes[0], "Normalize" in kinds)


def _modules(path: Path) -> list[tuple[str, str]]:
    """The class of each module and its folder, in order."""
    try:
        modules = json.loads(path.read_text(encoding="utf-8-sig"))
        found = [(str(module["type"]), str(module["path"])) for module in modules]
    except (OSError, ValueError, RecursionError, TypeError, KeyError, IndexError) as error:
        why = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(f"{path}: expected a list of modules, each with its type and path ({why})") from None
    if not found:
        raise UserError(f"{path} lists no module: expected Transformer and Pooling")
    for kind, _ in found:
        if not kind.startswith("sentence_transformers."):
            raise UserError(f"{path} names {kind}, code of its own, which is not run here")
    return [(kind.rpartition(".")[2], where) for kind, where in found]


def _read(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object, {} where there is no file. Raises UserError for a value of another kind than given here."""
    values = read_json(path) if path.is_file() else {}
    for key, kind in kinds.items():
        if key in values and not isinstance(values[key], kind):
            raise UserError(f"{path}: {key} is {json.dumps(values[key])[:60]}: correct it")
    return values


# ---------------------------------------------------------------------------------------------------------- writing


def write_sentence_folder(folder: AnyPath, config: SentenceConfig, hidden_size: int, max_seq_length: int) -> None:
    """Write what stands beside an encoder and its tokenizer. Raises UserError where a file cannot be written."""
    folder = Path(folder)
    modules = {"Transformer": "", "Pooling": POOLING} | ({"Normalize": "2_Normalize"} if config.normalize else {})
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(modules.items())
    ]
    pooling = {"word_embedding_dimension": hidden_size} | {key: mode == config.pooling for key, mode in MODES.items()}
    files: dict[str, Any] = {
        f"{POOLING}/config.json": pooling | {"include_prompt": True},
        LENGTHS: {"max_seq_length": max_seq_length, "do_lower_case": config.do_lower_case},
        ABOUT: {
            **config.others, "prompts": dict(config.prompts), "default_prompt_name": config.default_prompt_name,
            "similarity_fn_name": config.similarity_fn_name,
        },
        MODULES: listed,  # last: what makes it such a folder
    }  # fmt: skip
    for name in dict.fromkeys(path for path in modules.values() if path):
        make_folder(folder / name)
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(folder / name, lambda path, text=text: path.write_text(text, encoding="utf-8"))  # type: ignore[misc]
