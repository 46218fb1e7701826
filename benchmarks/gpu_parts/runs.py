"""Checks of whole runs: the quickstart on the device against the CPU, resume after kill -9, dry runs of the large recipes."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rows import ROOT
from safetensors.torch import load_file

from gpu_parts.cases import Case, Context, Emit, environment, metrics_of, quick_setup, sized
from gpu_parts.results import Row
from isoflop.plan import cost
from isoflop.train.command import pretrain_command

STEPS, KILL_AT, EVERY = 20, 13, 5
QUICKSTART = "recipes/quickstart.yaml"
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
# cuBLAS takes the same way each time with a workspace of its own (CUDA docs, cuBLAS 2.1.4); Inductor chooses no kernel by timing.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}


def plan(_: Context) -> list[Case]:
    """Small runs of many processes first, then the large models."""
    return [
        Case("quickstart", quickstart, 75),
        Case("resume after kill -9", resume, 60),
        Case("dry run modern_124m", lambda context, emit: dry_run(context, emit, "modern_124m"), 20),
        Case("dry run llama2_1.36b", lambda context, emit: dry_run(context, emit, "llama2_1.36b"), 25),
        Case("dry run llama3_1.5b", lambda context, emit: dry_run(context, emit, "llama3_1.5b"), 25),
    ]


def start(context: Context, script: list[str], run: Path, variables: dict[str, str], *overrides: str) -> subprocess.Popen[bytes]:
    """Start a command on the quickstart's recipe, its output in files beside the run folder."""
    run.parent.mkdir(parents=True, exist_ok=True)
    settings = [
        f"data.prepared_dir={context.work}/data/256", f"output.run_dir={run}", f"training.max_steps={STEPS}",
        "evaluation.max_windows=16", "evaluation.sample_tokens=8", *overrides,
    ]  # fmt: skip
    settings += ["training.micro_batch_size=2", "training.tokens_per_step=512"] if context.rehearse else []
    with run.with_suffix(".out").open("ab") as out, run.with_suffix(".err").open("ab") as err:
        return subprocess.Popen(
            [sys.executable, *script, QUICKSTART, *settings], cwd=ROOT, stdout=out, stderr=err, env=os.environ | variables
        )


def finish(process: subprocess.Popen[bytes], run: Path, expected: int = 0) -> None:
    """Wait for a command; its errors are the case's where it does not end as expected."""
    if process.wait() != expected:
        text = run.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"{run.name} ended with {process.returncode}, not {expected}:\n{text[-1500:]}")


def quickstart(context: Context, emit: Emit) -> None:
    """20 steps of scripts/pretrain.py in fp32 on the device and on the CPU, side by side."""
    folder = Path(tempfile.mkdtemp(prefix="quickstart-", dir=context.work))
    # In a rehearsal both are the CPU; another number of threads sums in another order.
    on_device = ON_CPU | {"OMP_NUM_THREADS": "2"} if context.rehearse else {"ACCELERATE_MIXED_PRECISION": "no"}
    on_cpu = ON_CPU | ({"OMP_NUM_THREADS": "1"} if context.rehearse else {})
    started = {
        name: start(context, ["scripts/pretrain.py"], folder / name, variables)
        for name, variables in {"device": on_device, "cpu": on_cpu}.items()
    }
    for name, process in started.items():
        finish(process, folder / name)
    rows, reference = metrics_of(str(folder / "device")), metrics_of(str(folder / "cpu"))
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)) or len(reference) != STEPS:
        raise RuntimeError(f"rows of {len(rows)} and {len(reference)} steps, not of {STEPS}")
    reason = "rounding differs by 6e-8 a sum; Adam divides by small second moments, so it grows about tenfold in a few steps"
    for key in ("loss", "grad_norm", "val_loss"):
        pairs = [(a[key], b[key]) for a, b in zip(rows, reference, strict=True) if b[key] is not None]
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        tolerance = 1e-2 if key == "grad_norm" else 1e-3
        emit(
            way="fp32, device against CPU", metric=f"largest relative difference of {key} in {STEPS} steps",
            difference=difference, tolerance=tolerance, passed=difference <= tolerance, reason=reason, first=pairs[0],
            last=pairs[-1],
        )  # fmt: skip


def resume(context: Context, emit: Emit) -> None:
    """A run killed by SIGKILL and resumed against an uninterrupted one, with deterministic settings and without, all at once."""
    folder = Path(tempfile.mkdtemp(prefix="resume-", dir=context.work))
    device = ON_CPU | {"OMP_NUM_THREADS": "1"} if context.rehearse else {"ACCELERATE_MIXED_PRECISION": "bf16"}
    script = ["-m", "gpu_parts.deterministic"]
    settings = {"deterministic": (["--deterministic"], device | DETERMINISTIC), "as it is": ([], device)}
    if context.rehearse:
        settings.pop("as it is")
        emit(way="as it is", skipped="a rehearsal: on a CPU the settings change nothing")
    sizes = [f"output.checkpoint_every={EVERY}"]
    runs = {}
    for name, (flags, variables) in settings.items():
        for way, more in {"uninterrupted": [], "killed": ["--kill-at", str(KILL_AT)]}.items():
            run = folder / f"{name.replace(' ', '-')}-{way}"
            runs[name, way] = (run, start(context, [*script, *flags, *more], run, variables, *sizes))
    for (_, way), (run, process) in runs.items():
        finish(process, run, -9 if way == "killed" else 0)
    resumed = {
        name: start(context, [*script, *flags], runs[name, "killed"][0], variables, *sizes)
        for name, (flags, variables) in settings.items()
    }
    for name, process in resumed.items():
        finish(process, runs[name, "killed"][0])
        compare_runs(emit, name, runs[name, "uninterrupted"][0], runs[name, "killed"][0])


def compare_runs(emit: Emit, name: str, uninterrupted: Path, killed: Path) -> None:
    """Losses of every step and final weights of two runs, bit for bit."""
    printed = killed.with_suffix(".out").read_text(encoding="utf-8")
    found = re.search(r"resuming from \S*step-(\d+)", printed)
    losses = [[row["loss"] for row in metrics_of(str(run))] for run in (uninterrupted, killed)]
    weights = [load_file(run / "model/model.safetensors") for run in (uninterrupted, killed)]
    apart = {
        "steps with another loss": sum(a != b for a, b in zip(*losses, strict=True)),
        "weights that differ": sum(int((weights[0][key] != weights[1][key]).sum()) for key in weights[0]),
    }
    largest = max((weights[0][key] - weights[1][key]).abs().max().item() for key in weights[0])
    facts: Row = {
        "resumed_from_step": int(found[1]) if found else 0, "killed_at_step": KILL_AT, "largest_weight_difference": largest,
        "weights": sum(tensor.numel() for tensor in weights[0].values()), "warnings": nondeterministic(killed),
    }  # fmt: skip
    for metric, count in apart.items():
        if name == "deterministic":
            reason = "a resumed run is the uninterrupted one, bit for bit; the smallest count that fails is 1"
            emit(way=name, metric=metric, difference=count, tolerance=0.5, passed=count == 0, reason=reason, **facts)
        else:
            emit(way=name, figure=count, unit=metric, **facts)


def nondeterministic(run: Path) -> list[str]:
    """Operations that torch names as having no deterministic form."""
    text = run.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
    return sorted(set(re.findall(r"([\w:]+) does not have a deterministic implementation", text)))


def dry_run(context: Context, emit: Emit, name: str) -> None:
    """`pretrain --dry-run` of a recipe at its micro-batch, over local text: the loss of one real step of an untrained model."""
    recipe = sized(context, name)
    printed = io.StringIO()
    with environment(ACCELERATE_MIXED_PRECISION="bf16"), quick_setup(context.device), contextlib.redirect_stdout(printed):
        code = pretrain_command(recipe, dry_run=True)
    text = printed.getvalue()
    print(text)
    found = re.search(r"one step: loss ([\d.]+).*, ([\d.]+) s, peak memory ([\d,]+) bytes", text)
    if code or found is None:
        raise RuntimeError(f"exit code {code}:\n{text[-1500:]}")
    loss, step_s, peak = float(found[1]), float(found[2]), int(found[3].replace(",", ""))
    shape = cost.shape_of(recipe.model)
    # Logits of an untrained model are normal with this variance: the head's rows over a normed stream of hidden_size dimensions.
    variance = recipe.model.initializer_range**2 * shape.hidden_size
    expected = math.log(shape.vocab_size) + variance / 2
    launch = cost.Launch("this", "single", gpu=context.device.type == "cuda")
    emit(
        way=f"bf16, micro-batch {recipe.training.micro_batch_size}", metric="loss - (ln vocabulary + variance of the logits / 2)",
        difference=abs(loss - expected), tolerance=0.25, passed=abs(loss - expected) <= 0.25,
        reason="sampling of a step's targets and the correlation with a tied embedding move it by hundredths to a tenth",
        loss=loss, step_s=step_s, peak_memory_bytes=peak, tokens_per_step=recipe.training.tokens_per_step,
        predicted_bytes=cost.predicted_memory(recipe.model, recipe.training, recipe.optimizer, launch).total,
        compile=recipe.training.compile,
    )  # fmt: skip
