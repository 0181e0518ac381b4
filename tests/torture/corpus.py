"""Whole files of every kind that is read here, made small and at once, and who reads them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import minibert as mb
from minibert import backends
from minibert.data import encode, load_tokenizer, read_documents, save_tokenizer, special_ids, train_tokenizer
from minibert.lab.lockstep.trace import load, save
from minibert.model import checkpoint
from minibert.model.sentence import SentenceBert
from minibert.tasks import read_texts
from minibert.tasks.finetune import FineTuning, FineTuningConfig
from minibert.tasks.questions import read_questions
from minibert.tasks.task import Classify
from minibert.tasks.words import read_words
from minibert.train import trainer
from minibert.train.checkpoint import MANIFEST, STATE, manifest, read_state
from minibert.train.config import TrainingConfig
from minibert.train.log import LOG, forget_after, read_log
from minibert.tuning import AdaLoraConfig, LoraConfig, PrefixTuningConfig, SeqBnConfig, get_peft_model, load_peft_model

TEXT = "The hill is steep. The cat sat on the hill, and the dog saw it.\nWho saw the cat? The dog did.\n\n\n"
MODEL = mb.BertConfig(
    vocab_size=60, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
    max_position_embeddings=32,
)  # fmt: skip
SETTINGS = TrainingConfig(max_steps=4, max_seq_length=16, tokens_per_batch=64, eval_tokens=64, save_steps=2)


class Kind(NamedTuple):
    """Files that are read together."""

    name: str
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    mutated: str = "*"  # which of them are mutated


# --------------------------------------------------------------------------------------------------------- models


def make_model(folder: Path) -> None:
    mb.BertForMaskedLM(MODEL, backend="numpy").save_pretrained(folder)


def make_shards(folder: Path) -> None:
    make_model(folder)
    arrays, _ = checkpoint.read_arrays(folder / checkpoint.WEIGHTS)
    (folder / checkpoint.WEIGHTS).unlink()
    where = {name: f"model-{number % 2 + 1}-of-2.safetensors" for number, name in enumerate(arrays)}
    for file in set(where.values()):
        checkpoint.write_arrays(folder / file, {n: a for n, a in arrays.items() if where[n] == file})
    (folder / checkpoint.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def read_model(folder: Path) -> None:
    model = mb.BertForMaskedLM.from_pretrained(folder, backend="numpy")
    model(np.array([[1, 2, 3]]))


def make_sentence_model(folder: Path) -> None:
    make_tokenizer(folder)
    mb.SentenceTransformer(SentenceBert(MODEL, "numpy"), load_tokenizer(folder)).save_pretrained(folder)


def read_sentence_model(folder: Path) -> None:
    mb.SentenceTransformer.from_pretrained(folder, backend="numpy").encode(["The hill.", "A cat, and a dog"])


def base() -> Any:
    return mb.BertForMaskedLM(MODEL, backend="numpy")


def make_adapter(folder: Path) -> None:
    get_peft_model(base(), LoraConfig(r=2, target_modules=["query", "value"])).save_pretrained(folder)


def make_adalora(folder: Path) -> None:
    get_peft_model(base(), AdaLoraConfig(init_r=3, target_r=2, total_step=9)).save_pretrained(folder)


def make_bottleneck(folder: Path) -> None:
    get_peft_model(base(), SeqBnConfig(reduction_factor=2)).save_pretrained(folder)


def make_prefix(folder: Path) -> None:
    get_peft_model(base(), PrefixTuningConfig(num_virtual_tokens=2)).save_pretrained(folder)


def read_adapter(folder: Path) -> None:
    load_peft_model(base(), folder)


# ----------------------------------------------------------------------------------------------------- tokenizers


def make_tokenizer(folder: Path) -> None:
    save_tokenizer(train_tokenizer([[TEXT]], 60), folder)


def make_vocabulary(folder: Path) -> None:
    make_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text('{"[NEW]": 61}')
    (folder / "special_tokens_map.json").write_text('{"unk_token": "[UNK]", "cls_token": {"content": "[CLS]"}}')


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    special_ids(tokenizer)
    encode([[TEXT, "the cat" * 50, "É中文\u0301 [MASK] ##x"]], tokenizer)
    save_tokenizer(tokenizer, folder / "again")


# ----------------------------------------------------------------------------------------------------------- runs


def documents_in(folder: Path) -> list[list[str]]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(TEXT * 8)
    return read_documents(folder / "text.txt")


@functools.cache
def run_of(folder: Path) -> Any:
    """A run that could go on."""
    tokenizer = train_tokenizer([[TEXT]], 60)
    data = trainer.prepare([[sentence for sentence in TEXT.split(".")]] * 8, tokenizer, SETTINGS)
    return trainer.Trainer(mb.BertForMaskedLM(MODEL, backend="numpy"), data, SETTINGS, folder)


def make_run(folder: Path) -> None:
    run = run_of(folder)
    for _ in run.run():
        pass
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    for path in folder.iterdir():
        if path.is_file() and path.name != "training_log.jsonl":
            path.unlink()
    for name in list(manifest(newest)):
        if name not in (STATE, "training_log.jsonl"):
            (newest / name).unlink()
    content = json.loads((newest / MANIFEST).read_text())
    content["files"] = {name: about for name, about in content["files"].items() if (newest / name).is_file()}
    (newest / MANIFEST).write_text(json.dumps(content))


def read_run(folder: Path) -> None:
    read_log(folder)
    run_of(folder.parent).resume(read_state(folder))
    forget_after(folder, 2)


@functools.cache
def fine_tuning_of(folder: Path) -> Any:
    """The same of fine-tuning: its progress has a best model."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "labelled.csv"
    table.write_text("text,label\nthe cat sat,yes\nthe dog saw,no\n" * 4)
    texts, tokenizer = read_texts(table, "classify"), train_tokenizer([[TEXT]], 60)
    task = Classify.of(texts)
    part = task.prepare(texts, tokenizer, 16)
    config = FineTuningConfig(num_train_epochs=2, per_device_train_batch_size=4, max_seq_length=16, logging_steps=1)
    model = mb.BertForSequenceClassification(replace(MODEL, **task.labels()), backend="numpy")
    return FineTuning(model, task, part, part, tokenizer, config, folder / "run")


def make_old_fine_tuning(folder: Path) -> None:
    run = fine_tuning_of(folder.parent / "fine-tuning")
    for _ in run.run():
        pass
    newest = sorted(run.output.glob("checkpoint-*"))[-1]
    folder.mkdir(parents=True)
    for name in (STATE, LOG):
        (newest / name).rename(folder / name)


def read_fine_tuning(folder: Path) -> None:
    run = fine_tuning_of(folder.parent / "another")
    run.resume(read_state(folder, FineTuningConfig))
    run.rank(run.progress["best"])


def make_old_run(folder: Path) -> None:
    """As runs were before there were checkpoints: no digest tells that the state is another."""
    make_run(folder)
    newest = sorted(folder.glob("checkpoint-*"))[-1]
    (newest / STATE).rename(folder / STATE)
    for path in sorted(folder.glob("checkpoint-*/*")):
        path.unlink()
    for path in folder.glob("checkpoint-*"):
        path.rmdir()


def make_trace(folder: Path) -> None:
    from minibert.data import Batches, make_sequences, masking_rule
    from minibert.lab.lockstep.trace import Side, record

    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([[TEXT]], 60)
    sequences = make_sequences(encode([[TEXT]], tokenizer), special_ids(tokenizer), 16)
    batch = Batches(sequences, 64, 0, masking_rule(special_ids(tokenizer), 60)).batch(0)
    side = Side(backends.get("numpy"))
    made = record(side, lambda backend, dtype: mb.BertForMaskedLM(MODEL, backend, dtype), batch)
    save(made, folder / "trace.safetensors", {"machine": "here"})


def read_trace(folder: Path) -> None:
    made = load(folder / "trace.safetensors")
    for number in range(len(made.calls)):
        made.seen(number, {})


# ----------------------------------------------------------------------------------------------------------- data

TABLES = {
    "a.csv": 'text,label\nThe hill.,x\n"a, ""b""\nc",y\nThe cat,x\n',
    "b.tsv": "text\tlabel\nThe hill.\tx\nThe cat\ty\n",
    "c.jsonl": '{"text": "The hill.", "label": "x"}\n{"text": "The cat", "label": "y"}\n',
    "d.json": '[{"text": "The hill.", "label": 1},\n {"text": "The cat", "label": 2.5}]\n',
}
WORDS = {
    "a.conll": "-DOCSTART- O\n\nThe O\nhill B-X\n. O\n\nA O\ncat B-Y\n",
    "b.conllu": "# text = The hill\n1\tThe\tthe\tDET\t_\t_\t2\tdet\t_\t_\n"
    "2-3\thills\t_\t_\t_\t_\t_\t_\t_\tSpaceAfter=No\n"
    "2\thill\thill\tNOUN\t_\t_\t0\troot\t_\t_\n\n",
    "c.jsonl": '{"tokens": ["The", "hill"], "ner_tags": ["O", "B-X"]}\n{"tokens": ["A"], "ner_tags": ["O"]}\n',
}
QUESTIONS = {
    "a.json": json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "The cat sat.", "qas": [
        {"id": "1", "question": "Who sat?", "answers": [{"text": "cat", "answer_start": 4}]},
        {"id": "2", "question": "Who ran?", "answers": [], "is_impossible": True}]}]}]}),
    "b.jsonl": json.dumps({"id": "1", "question": "Who sat?", "context": "The cat sat.",
                           "answers": {"text": ["cat"], "answer_start": [4]}}) + "\n",
}  # fmt: skip


def maker(files: dict[str, str]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")

    return make


def reader(read: Callable[[Path], Any]) -> Callable[[Path], None]:
    """All files of a folder, of which one is mutated."""

    def read_all(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            read(path)

    return read_all


def read_table(path: Path) -> None:
    found = read_texts(path, "classify")
    found.label_names()


def read_tagged(path: Path) -> None:
    read_words(path).label_names()


KINDS = (
    Kind("model", make_model, read_model),
    Kind("shards", make_shards, read_model),
    Kind("sentence model", make_sentence_model, read_sentence_model, "*.json"),
    Kind("LoRA", make_adapter, read_adapter),
    Kind("AdaLoRA", make_adalora, read_adapter),
    Kind("bottleneck", make_bottleneck, read_adapter),
    Kind("prefix", make_prefix, read_adapter),
    Kind("tokenizer", make_tokenizer, read_tokenizer, "*.json"),
    Kind("vocabulary", make_vocabulary, read_tokenizer),
    Kind("run", make_run, read_run),
    Kind("old run", make_old_run, read_run),
    Kind("old fine-tuning", make_old_fine_tuning, read_fine_tuning),
    Kind("trace", make_trace, read_trace),
    Kind("tables", maker(TABLES), reader(read_table)),
    Kind("words", maker(WORDS), reader(read_tagged)),
    Kind("questions", maker(QUESTIONS), reader(read_questions)),
    Kind("text", documents_in, reader(read_documents)),
)


def make_corpus(folder: Path) -> None:
    for kind in KINDS:
        kind.make(folder / kind.name)
