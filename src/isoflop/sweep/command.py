"""The command `sweep`: prepare the data, train what is left, fit the law; or say what there is to do."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import NamedTuple

from isoflop.data.manifest import Manifest
from isoflop.disk import write_new
from isoflop.errors import UserError
from isoflop.fit.command import Request as FitRequest
from isoflop.fit.command import fit_command, require_own_law
from isoflop.prepare.command import prepare
from isoflop.recipe_file import load_recipe, to_yaml
from isoflop.run_folder import RunFolder
from isoflop.scaling.laws import load_law
from isoflop.stop import EXIT_RESUME
from isoflop.sweep.design import Group, groups_of, target_of
from isoflop.sweep.runner import Runner, recipe_file, slots_of
from isoflop.sweep.state import as_json, report, state_of
from isoflop.sweep.suite import Suite, load_suite


class Request(NamedTuple):
    """What was typed."""

    sweep: str
    config: str = "accelerate_configs/cpu.yaml"
    gpus: tuple[str, ...] = ()
    jobs: int = 1
    only: int | None = None
    slurm: str | None = None
    dry_run: bool = False
    as_json: bool = False
    target: float | None = None


def sweep_command(request: Request) -> int:
    """Carry out a request; returns the exit code."""
    suite = load_suite(request.sweep)
    groups = groups_of(suite)
    if request.target is not None:
        return write_target(suite, request.target)
    if request.dry_run:
        tell(groups, request.as_json)
        return 0
    if request.only is not None and not 0 <= request.only < len(groups):
        raise UserError(f"--only {request.only}: the sweep has groups 0 to {len(groups) - 1}; --dry-run lists its runs")
    require_own_folders(groups, request.sweep, suite)
    manifest = prepare(groups[0][0].recipe)
    assert manifest is not None  # of one shard there would be none
    print("\n".join(repetitions(groups, manifest)) or "no run sees a window twice", flush=True)
    if request.slurm:
        return write_slurm(request, groups, suite)
    chosen = groups if request.only is None else [groups[request.only]]
    runner = Runner(chosen, slots_of(list(request.gpus), request.jobs), request.config, Path(suite.output_dir))
    code = runner.train()
    tell(groups, request.as_json)
    if code:
        return code
    if any(state_of(run).what != "finished" for group in groups for run in group):
        print("the rest is in other hands; the same command fits the law when all are finished")
        return 0 if request.only is not None else EXIT_RESUME
    return fit_command(FitRequest((suite.output_dir,), out=law_file(suite)))


def law_file(suite: Suite) -> str:
    """Where a sweep's law is."""
    return f"{suite.output_dir}/law.json"


def write_target(suite: Suite, flops: float) -> int:
    """Write the recipe of a run at a larger budget, by the sweep's rules and its law."""
    if not 0 < flops < math.inf:
        raise UserError(f"--target {flops:g}: give a budget in FLOPs, e.g. ten times the sweep's largest")
    law = load_law(law_file(suite))
    run = target_of(suite, law, flops)
    promised = law.promise(run.recipe.model, run.tokens)
    file = Path(f"{run.name}.yaml")
    write_new(file, to_yaml(run.recipe, exclude_none=True), f"--target {flops:g}: {file}")
    interval = " to ".join(f"{bound:.4f}" for bound in promised.interval or ())
    print(
        f"{file}: {run.parameters:,} parameters, {run.tokens:,} tokens in {run.steps:,} steps, {run.flops:.4g} FLOPs\n"
        f"{law.name} predicts a last validation loss of {promised.loss:.4f}" + (f" ({interval})" if interval else "") + "\n"
        f"train it: accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py {file}"
    )
    return 0


def require_own_folders(groups: list[Group], sweep: str, suite: Suite) -> None:
    """Raise `UserError` where a folder has a run of another recipe, which would else be taken for one of this sweep's.

    Also where a recipe of the sweep, or its law, would overwrite somebody else's file.
    """
    try:
        require_own_law(f"{sweep}: output_dir", law_file(suite))
        for run in (run for group in groups for run in group):
            RunFolder(run.recipe.output.run_dir).check_owner(run.recipe)
            file = recipe_file(Path(suite.output_dir), run)
            if file.exists() and load_recipe(file).output.run_dir != run.recipe.output.run_dir:
                raise UserError(f"{file} exists already, and is no recipe of this sweep; move it away")
    except UserError as error:
        raise UserError(f"{sweep}: {error}; of a whole sweep: its output_dir") from None


def tell(groups: list[Group], as_numbers: bool) -> None:
    """Print the table, or its numbers."""
    states = [state_of(run) for group in groups for run in group]
    print(json.dumps(as_json(states), indent=1) if as_numbers else report(states), flush=True)


def repetitions(groups: list[Group], manifest: Manifest) -> list[str]:
    """A warning for each run that sees its text more than once: repeats are worth less, and the law would take them for fresh."""
    there = sum(split.windows for split in manifest.split("train")) * manifest.sequence_length
    return [
        f"warning: {run.name}: {run.tokens / there:.2f} epochs of {there:,} tokens; a law of fresh data needs more text"
        for group in groups
        for run in group
        if run.tokens > there
    ]


def write_slurm(request: Request, groups: list[Group], suite: Suite) -> int:
    """A job array with a task for each group; the one that ends last fits the law."""
    assert request.slurm is not None
    again = ["python", "scripts/sweep.py", request.sweep, "--config", request.config]
    folder = Path(suite.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_new(
        Path(request.slurm),
        f"""#!/usr/bin/env bash
#SBATCH --job-name={Path(request.sweep).stem}
#SBATCH --array=0-{len(groups) - 1}
#SBATCH --gpus-per-task=1
#SBATCH --output={folder}/slurm-%A_%a.log
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# Time limit, partition and account: give them to sbatch, or add them here. A task that is stopped goes on when it runs again.
exec {shlex.join(again)} --only "$SLURM_ARRAY_TASK_ID"
""",
        f"--slurm {request.slurm}",
    )
    print(f"{request.slurm} has {len(groups)} tasks; start them with: sbatch {shlex.quote(request.slurm)}")
    return 0
