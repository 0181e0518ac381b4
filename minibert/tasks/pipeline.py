"""A fine-tuned model as it is used: texts, words or questions in, predictions out.

    classify = pipeline("folder")
    classify(["a splendid film", "what a waste"])      # [{"text": ..., "label": "pos", "score": 0.98, ...}, ...]

The folder is one that `minibert finetune`, or transformers, wrote; or one with an adapter beside another model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minibert.backends import Backend
from minibert.data import load_tokenizer
from minibert.errors import UserError
from minibert.model.checkpoint import read_config, read_json
from minibert.model.sentence_config import MODULES, encoder_folder
from minibert.tasks.columns import Columns
from minibert.tasks.embedding_task import Embed, sentence_config_in
from minibert.tasks.examples import REGRESSION, TextExample, TextExamples
from minibert.tasks.finetune import predict
from minibert.tasks.predictions import predictions
from minibert.tasks.questions import Question, QuestionExamples
from minibert.tasks.task import Answer, Tag, Task, architecture_of, most_tokens, task_of
from minibert.tasks.words import Sentence, WordExamples, joined, plain_sentences
from minibert.tuning import load_peft_model
from minibert.tuning.files import CONFIG as ADAPTER

GIVEN = "what was given"  # the name of examples that come from no file


class Pipeline:
    """A fine-tuned model with its task and tokenizer. `kind` is what `minibert finetune` calls the task."""

    def __init__(self, task: Task, model: Any, tokenizer: Tokenizer, max_seq_length: int | None = None) -> None:
        positions = most_tokens(model)
        if max_seq_length is not None and not 3 <= max_seq_length <= positions:
            raise UserError(
                f"expected max_seq_length from 3 to {positions}, the model's positions, got {max_seq_length}"
            )
        self.task, self.model, self.tokenizer = task, model, tokenizer
        model.prepack()
        usual = min(task.max_seq_length, positions) if isinstance(task, Answer | Embed) else positions
        self.max_seq_length = max_seq_length or usual

    @property
    def kind(self) -> str:
        if isinstance(self.task, Embed):
            return "embed"
        if isinstance(self.task, Answer | Tag):
            return "answer" if isinstance(self.task, Answer) else "tag"
        return "regress" if self.task.problem_type == REGRESSION else "classify"

    def __call__(self, inputs: Sequence[Any], batch_tokens: int = 4096) -> list[dict[str, Any]]:
        """A prediction for each input, in order; see `tasks.predictions` for what is in one.

        Inputs are texts, or pairs of texts, to classify or regress; texts, or lists of words, to tag; and mappings with
        question and context to answer. Raises UserError for others.
        """
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            raise UserError(f"expected a list of inputs, got {type(inputs).__name__}: give [text]")
        return self.of_examples(self.examples(inputs), batch_tokens) if inputs else []

    def of_examples(self, examples: Any, batch_tokens: int = 4096) -> list[dict[str, Any]]:
        """As a call, of examples that were read from a file."""
        part = self.task.prepare(examples, self.tokenizer, self.max_seq_length)
        return list(predictions(self.task, part, predict(self.task, self.model, part, batch_tokens)))

    def examples(self, inputs: Sequence[Any]) -> Any:
        """Inputs as if they had been read."""
        if isinstance(self.task, Answer):
            return QuestionExamples(GIVEN, [_question(number, one) for number, one in enumerate(inputs)])
        if isinstance(self.task, Tag):
            return WordExamples(GIVEN, "", [_sentence(one) for one in inputs])
        paired = isinstance(inputs[0], tuple | list)
        rows = []
        for number, one in enumerate(inputs, 1):
            parts = tuple(one) if isinstance(one, tuple | list) else (one,)
            if len(parts) != 1 + paired or not all(isinstance(part, str) for part in parts):
                raise UserError(
                    f"input {number}: expected {'a pair of texts' if paired else 'a text'}, got {one!r:.80}"
                )
            rows.append(TextExample(number, parts[0], parts[1] if paired else None, None, None, {}))
        return TextExamples.of(GIVEN, Columns("text", "pair" if paired else None), rows)


def _question(number: int, given: Any) -> Question:
    try:
        return Question(str(given.get("id", number)), given["question"] + "", given["context"] + "", [])
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"input {number + 1}: expected a mapping with question and context, got {given!r:.80}"
        ) from None


def _sentence(given: Any) -> Sentence:
    if isinstance(given, str):
        (sentence,) = plain_sentences([given])
        return sentence
    words = list(given)
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"expected a text or a list of words, got {given!r:.80}")
    return joined(words, [1] * len(words), None)


def pipeline(
    folder: str | Path, backend: str | Backend = "numba", dtype: str = "float32", *, base: str | Path | None = None,
    max_seq_length: int | None = None,
) -> Pipeline:  # fmt: skip
    """Load a fine-tuned model that makes predictions, on a backend: as `fine_tuned`.

    Raises UserError for an encoder of sentences too.
    """
    found = fine_tuned(folder, backend, dtype, base=base, max_seq_length=max_seq_length)
    if isinstance(found.task, Embed):
        raise UserError(
            f"{folder} holds an encoder of sentences: its vectors are made by `minibert embed` and compared by "
            "`minibert similarity` (in Python by SentenceTransformer)"
        )
    return found


def fine_tuned(
    folder: str | Path, backend: str | Backend = "numba", dtype: str = "float32", *, base: str | Path | None = None,
    max_seq_length: int | None = None,
) -> Pipeline:  # fmt: skip
    """Load a fine-tuned model, an encoder of sentences too, on a backend.

    Where the folder holds an adapter, `base` is the folder of the model that it stands beside, if it is not where it
    was. Raises UserError for a folder that holds no fine-tuned model.
    """
    if (Path(folder) / MODULES).is_file():
        embed = Embed(sentence_config_in(folder))
        encoder = encoder_folder(folder)
        return Pipeline(embed, embed.load(folder, backend, dtype), load_tokenizer(encoder), max_seq_length)
    config = read_config(folder)
    try:
        task = task_of(config, architecture_of(config))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    if task is None:
        raise UserError(
            f"{folder} holds {architecture_of(config) or 'a model without a name'}: expected a fine-tuned model, as "
            "`minibert finetune` writes, with BertForSequenceClassification, BertForTokenClassification or "
            "BertForQuestionAnswering, or ELECTRA's of these, in its config.json (masks are filled by `minibert "
            "fill-mask`, vectors made by `minibert embed`)"
        )
    tokenizer = load_tokenizer(folder)
    if not (Path(folder) / ADAPTER).is_file():
        model, info = task.model_class(config).from_pretrained(folder, backend, dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise UserError(f"{folder} lacks {', '.join(sorted(info['missing_keys']))}: fine-tune it first")
        return Pipeline(task, model, tokenizer, max_seq_length)
    named = read_json(Path(folder) / ADAPTER).get("base_model_name_or_path")
    beside = base or named or config.others.get("_name_or_path")
    if not beside or not Path(beside).is_dir():
        raise UserError(f"{folder} holds an adapter of the model {beside}, which is not there: name its folder as base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a head that is missing there: it is in the adapter, or that is refused
        model = task.model_class(config).from_pretrained(
            beside, backend, dtype, config=config, ignore_mismatched_sizes=True
        )
    return Pipeline(task, load_peft_model(model, folder), tokenizer, max_seq_length)
