"""Is it right? Every op against its formula, compute-sanitizer, a tiny training run beside NumPy, parity."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np

from bench.gpu_check.part import Failed, Run, Skipped
from bench.gpu_check.run import ROOT
from minibert.backends.base import dtype_of
from minibert.errors import pip_install
from minibert.kernels import OPS
from minibert.kernels.op import BertSize, outputs
from minibert.lab.conform.check import CheckResult, planned, run_check
from minibert.lab.conform.judge import expect, judge_against, stored_as
from minibert.model.bert import BertForMaskedLM
from minibert.model.config import BertConfig
from minibert.model.packing import IGNORE, Packed, pack
from minibert.train.graphed import GraphedSteps
from minibert.train.optim import AdamW, parameter_groups

MOST_MESSAGES = 20
DTYPES = ("float32", "bfloat16", "float16")
AT_WIDTH = BertSize(2, 128, 768, 12, 3072, 30522, 38)  # the widths of BERT base, few rows: a CPU computes the truth
FLAT = ("adamw", "adamw_shadow", "square_norm", "clip_scale")  # one long axis: samples have that
FEW = ("softmax", "gelu", "layer_norm_grad", "cross_entropy", "attention_grad")
SANITIZED = (*FEW, "add_layer_norm", "scatter_rows", "reduce_sum", "adamw_shadow", "square_norm")
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # the exit status compute-sanitizer is told to give
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
LOSS_TOLERANCE = 1e-4


# --------------------------------------------------------------------------------------------------------- conformance


def conformance(run: Run) -> None:
    """Every demand of `check` to every op in each dtype, then the widths of BERT base; all by hard bounds."""
    tally: dict[str, dict[str, Any]] = {}
    messages: list[str] = []
    run.keep(by=dict(Counter(run.backend.by(op) for op in OPS.values())), dtypes=tally, failures=messages)
    for dtype in DTYPES:
        try:
            dtype_of(dtype)
        except Exception as error:
            run.skip(f"{dtype}: {error}")
            continue
        results = _small_samples(run, dtype)
        if dtype != "float16":  # its kernels are bfloat16's with another conversion
            results += _at_width(run, dtype)
        messages += [r.message for r in results if not r.ok][:MOST_MESSAGES]
        worst = max(results, key=lambda r: r.bound_share or 0.0)
        tally[dtype] = {
            "checks": len(results),
            "inputs": sum(r.inputs for r in results),
            "failed": sum(not r.ok for r in results),
            "largest_bound_share": worst.bound_share,
            "of": worst.op,
            "bound_share": _shares(results),
        }
        run.write()
    if messages:
        raise Failed(f"{sum(t['failed'] for t in tally.values())} checks fail, the first: {messages[0]}")
    if not tally:
        raise Failed("no dtype could be checked")


def _small_samples(run: Run, dtype: str) -> list[CheckResult]:
    results = []
    for number, op in enumerate(OPS.values(), 1):
        run.say(f"{dtype}: {op.name} ({number} of {len(OPS)})")
        names = [name for name, kind in planned(run.backend, op, [dtype]) if kind == dtype]
        if run.settings.tiny:  # the whole suite runs on the emulator elsewhere
            names = names if op.name in FEW[:2] and dtype == "float32" else ["follows_formula"]
        results += [run_check(name, op, run.backend, dtype) for name in names]
    return results


def _at_width(run: Run, dtype: str) -> list[CheckResult]:
    """Each op once at the channels, heads and vocabulary of BERT base: code that small samples do not reach."""
    size = BertSize(2, 8, 64, 2, 128, 200, 3) if run.settings.tiny else AT_WIDTH
    results = []
    for op in (op for op in OPS.values() if op.name not in FLAT):
        if run.left() < 10:
            run.skip(f"{dtype} at BERT base widths, from {op.name} on: the time is up")
            break
        run.say(f"{dtype}: {op.name} at BERT base widths")
        message, share = "", None
        try:
            sample = op.bench(np.random.default_rng(7), size)
            given = map(np.asarray, sample.arrays)
            kinds = stored_as(op, sample.arrays, dtype)
            arrays = [np.array(a, kind) for a, kind in zip(given, kinds, strict=True)]
            expected = expect(op, arrays, sample.params, dtype)
            result = run.backend.run(op, *map(run.backend.asarray, arrays), **sample.params)
            judgement = judge_against(expected, tuple(map(run.backend.numpy, outputs(result))))
            share = judgement.bound_share
            if not judgement.ok:
                message = f"{op.name} in {dtype} at {size}: {judgement.problem or judgement.worst}"
        except Exception as error:
            message = f"{op.name} in {dtype} at {size}: {type(error).__name__}: {error}"
        by = run.backend.by(op)
        results.append(
            CheckResult(
                op.name, run.backend.name, dtype, "at_width", by, 1, None, None, share, not message, message
            )
        )  # fmt: skip
    return results


def _shares(results: list[CheckResult]) -> dict[str, float]:
    """The largest share of its bound that each op used up."""
    found: dict[str, float] = {}
    for result in results:
        found[result.op] = max(found.get(result.op, 0.0), result.bound_share or 0.0)
    return found


# ----------------------------------------------------------------------------------------------------------- sanitizer


def sanitizer(run: Run) -> None:
    """memcheck and racecheck over a few ops, where NVIDIA's compute-sanitizer is found and takes this device."""
    if run.emulated:
        raise Skipped("compute-sanitizer watches GPUs; the emulator's own checks were on in the part before")
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))
    if program is None:
        raise Skipped("compute-sanitizer: not found; it comes with the CUDA toolkit")
    tools: dict[str, str] = {}
    run.keep(program=program, ops=SANITIZED, tools=tools)
    findings = []
    for number, tool in enumerate(TOOLS):
        run.say(f"{tool} over {len(SANITIZED)} ops")
        limit = (run.left() - 2) / (len(TOOLS) - number)
        if limit < 5:
            tools[tool] = "skipped: the time is up"
            continue
        tools[tool], found = sanitized(program, tool, run, limit)
        run.write()
        if found:
            findings.append(f"{tool}: {tools[tool]}")
    if findings:
        raise Failed("; ".join(findings))
    if all(said != "no errors" for said in tools.values()):
        raise Skipped("; ".join(f"{tool}: {said}" for tool, said in tools.items()))
    for tool, said in tools.items():
        if said != "no errors":
            run.skip(f"{tool}: {said}")


def sanitized(program: str, tool: str, run: Run, limit: float) -> tuple[str, bool]:
    """What one tool says, and whether it found something."""
    settings = f'{{"backend": "{run.settings.backend}", "tiny": true}}'
    out, report = run.out.with_suffix(f".{tool}.json"), run.out.with_suffix(".none.json")
    report.write_text("{}", encoding="utf-8")
    command = [
        program, "--tool", tool, "--error-exitcode", str(FOUND), "--report-api-errors", "no", "--print-limit", "20",
        sys.executable, "-m", "bench.gpu_check.part",
        f"{__name__}:few_ops", settings, str(out), str(report), str(limit),
    ]  # fmt: skip
    code, text = called(command, limit)
    lines = [line.lstrip("= ").strip() for line in text.splitlines() if line.startswith("=========")]
    errors = sum(int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text))
    if code is None:
        return f"not done within {limit:.0f} s", False
    if errors or code == FOUND:
        told = [line for line in lines if line and not line.startswith("COMPUTE-SANITIZER")]
        return f"{errors} errors: {' | '.join(told[:8])}", True
    if "SUMMARY: 0" not in text:
        return f"it does not run here (exit status {code}): {' '.join(text.split())[-300:]}", False
    if code:  # the ops' own verdict: they are judged under the tool as well
        return f"exit status {code} without an error of the tool: {' '.join(text.split())[-300:]}", True
    return "no errors", False


def few_ops(run: Run) -> None:
    """Run under compute-sanitizer: launches that share memory among threads, and those that read at an index."""
    for dtype in ("float32", "bfloat16"):
        for name in SANITIZED:
            result = run_check("follows_formula", OPS[name], run.backend, dtype)
            if not result.ok:
                raise SystemExit(result.message)


def called(command: list[str], limit: float) -> tuple[int | None, str]:
    """Exit status (None: killed at the limit) and what it printed."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, _ = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired as late:
        child.kill()  # what it started is of this part's process group, and ends with the part
        return None, late.output.decode(errors="replace") if isinstance(late.output, bytes) else late.output or ""
    return child.returncode, text


# ------------------------------------------------------------------------------------------------- tiny training run


def tiny_training(run: Run) -> None:
    """Losses of a few steps with dropout: those of NumPy, the same bits twice, op by op and as captured graphs."""
    config = BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    steps = 4 if run.settings.tiny else 20
    batches = [ragged_batch(config, seed, tokens=28) for seed in range(2)]
    run.say("by NumPy")
    expected, _ = trained(config, "numpy", batches, steps, graph=False)
    run.keep(steps=steps, layers=2, tolerance=LOSS_TOLERANCE, numpy=expected)
    wrong = []
    for way, graph in (("op by op", False), ("captured graphs", True)):
        with run.at_speed() as backend:
            runs = []
            for attempt in ("once", "again"):
                run.say(f"{way}, {attempt}")
                runs.append(trained(config, backend.name, batches, steps, graph))
        (losses, weights), (again, weights_again) = runs
        apart = float(np.abs(np.subtract(losses, expected)).max())
        same = losses == again and weights == weights_again
        run.keep(**{way: {"losses": losses, "largest_difference": apart, "same_bits_twice": same}})
        if not apart <= LOSS_TOLERANCE:
            wrong.append(f"{way}: a loss is {apart:.2g} from NumPy's, allowed {LOSS_TOLERANCE}")
        if not same:
            wrong.append(f"{way}: two runs give other bits")
    if wrong:
        raise Failed("; ".join(wrong))


def ragged_batch(config: BertConfig, seed: int, tokens: int) -> Packed:
    """Three sequences of unequal length; every fifth token is predicted."""
    rng = np.random.default_rng(seed)
    cuts = np.array([0, 11, 11 + 4 + seed, tokens - seed])
    ids = rng.integers(1, config.vocab_size, cuts[-1])
    labels = np.where(np.arange(len(ids)) % 5 == 2, rng.integers(1, config.vocab_size, len(ids)), IGNORE)
    return pack(config, ids, labels=labels, cu_seqlens=cuts)


def trained(
    config: BertConfig, backend: str, batches: list[Packed], steps: int, graph: bool
) -> tuple[list[float], list[bytes]]:
    """The loss of every step, and the weights at the end."""
    model = BertForMaskedLM(config, backend, "float32", seed=3)
    model.train()
    optimizer = AdamW(parameter_groups(model, 0.01), lr=1e-3, max_grad_norm=1.0)
    graphed = GraphedSteps(model, optimizer, tokens_per_batch=32) if graph else None
    losses = []
    for step in range(steps):
        packed = batches[step % len(batches)]
        if graphed is not None:
            loss, square_norm, recorded = graphed.gradients(packed, step)
            losses.append(float(model.backend.numpy(loss)))
            optimizer.check_norm(square_norm)
            graphed.update(recorded, square_norm)
        else:
            optimizer.zero_grad()
            model.step = step
            out = model(packed).loss
            out.backward()
            losses.append(out.item())
            optimizer.step()
    if graphed is not None and graphed.replays == 0:
        raise Failed("captured graphs: no step was replayed")
    return losses, [values.tobytes() for values in model.state_dict().values()]


# ------------------------------------------------------------------------------------------------------------- parity


def parity(run: Run) -> None:
    """pytest -m parity: weights, outputs and gradients of transformers' BERT, on every backend that runs here."""
    needed = ("torch", "transformers", "pytest", "hypothesis")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"not installed: {', '.join(missing)}: {pip_install('[test,parity]')}")
    if run.settings.tiny:
        raise Skipped("left to `make test` where nothing is measured")
    marked = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.parity" in p.read_text(encoding="utf-8")]
    files = [str(p.relative_to(ROOT)) for p in marked if not p.name.startswith("test_gpu_check")]
    run.keep(files=files)
    run.say(f"pytest -m parity {' '.join(files)}")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "parity", "-p", "no:cacheprovider", *files]
    code, text = called(command, max(1.0, run.left() - 1))
    last = text.strip().splitlines()[-1:] or [""]
    run.keep(exit=code, summary=last[0])
    if code is None:
        raise Skipped(f"not done within its time: {last[0]:.200}")
    if code == 1:
        wrong = [line for line in text.splitlines() if line.startswith(("FAILED", "ERROR"))]
        raise Failed(f"{last[0]}: {'; '.join(wrong[:5])}")
    if code:
        raise RuntimeError(f"pytest ended with status {code}: {' '.join(text.split())[-500:]}")
