"""The command `sweep`: prepare the data, train what is left and fit the law; or print what is left."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from isoflop.config.loading import load_recipe, to_yaml
from isoflop.config.shipped import find
from isoflop.data.manifest import Manifest
from isoflop.prepare.run import prepare
from isoflop.scaling.fit import fit_command
from isoflop.scaling.laws import load_law
from isoflop.scaling.measured import FEWEST_POINTS
from isoflop.scaling.options import FitOptions
from isoflop.scaling.result import require_own_law
from isoflop.scaling.tuned import same_size
from isoflop.sweep.config import SweepConfig, load_sweep_config
from isoflop.sweep.design import Group, groups_of, target_of
from isoflop.sweep.runner import Runner, recipe_file, slots_of
from isoflop.sweep.state import report, state_of, states_json
from isoflop.train.run_folder import RunFolder
from isoflop.train.signals import EXIT_RESUME
from isoflop.utils.errors import UserError
from isoflop.utils.io import write_new
from isoflop.utils.output import log_to_console


class SweepOptions(NamedTuple):
    """Options of the command."""

    sweep: str
    config: str = "cpu"
    gpus: tuple[str, ...] = ()
    jobs: int = 1
    only: int | None = None
    slurm: str | None = None
    dry_run: bool = False
    as_json: bool = False
    target: float | None = None


def sweep_command(options: SweepOptions) -> int:
    """Run the command; returns the exit code."""
    sweep = load_sweep_config(options.sweep)
    groups = groups_of(sweep)
    if options.target is not None:
        return write_target(sweep, options.target)
    if options.dry_run:
        print_states(groups, options.as_json)
        return 0
    if options.only is not None and not 0 <= options.only < len(groups):
        raise UserError(f"--only {options.only}: the sweep has groups 0 to {len(groups) - 1}; --dry-run lists its runs")
    require_own_folders(groups, options.sweep, sweep)
    log_to_console()
    manifest = prepare(groups[0][0].recipe)
    print("\n".join(repetitions(groups, manifest)) or "no run repeats a window", flush=True)
    if options.slurm:
        return write_slurm(options, groups, sweep)
    chosen = groups if options.only is None else [groups[options.only]]
    config = str(find("accelerate_configs", options.config))
    runner = Runner(chosen, slots_of(list(options.gpus), options.jobs), config, Path(sweep.output_dir))
    code = runner.train()
    print_states(groups, options.as_json)
    if code:
        return code
    if any(state_of(run).what != "finished" for group in groups for run in group):
        print("other processes train the rest; the same command fits the law when all are finished")
        return 0 if options.only is not None else EXIT_RESUME
    return fit_sweep(groups, sweep)


def fit_sweep(groups: list[Group], sweep: SweepConfig) -> int:
    """Fit the law of a finished sweep; laws of learning rate and batch alone where there is no law of the loss."""
    options = FitOptions((sweep.output_dir,), out=law_file(sweep), hyperparameters=fits_alone(groups, sweep))
    code = fit_command(options)
    if code == 0 or options.hyperparameters or not sweep.has_axes:
        return code
    return fit_command(replace(options, hyperparameters=True))


def fits_alone(groups: list[Group], sweep: SweepConfig) -> bool:
    """Return whether only laws of learning rate and batch are fitted: where the sizes and budgets are too few for the loss."""
    runs = [run for group in groups for run in group]
    parameters, tokens = (np.array(values, dtype=float) for values in ([r.parameters for r in runs], [r.tokens for r in runs]))
    return sweep.has_axes and len(same_size(parameters, tokens)) < FEWEST_POINTS


def law_file(sweep: SweepConfig) -> str:
    """Return the file of a sweep's law."""
    return f"{sweep.output_dir}/law.json"


def write_target(sweep: SweepConfig, flops: float) -> int:
    """Write the recipe of a run at a larger budget, by the sweep's rules and its law."""
    if not 0 < flops < math.inf:
        raise UserError(f"--target {flops:g}: give a budget in FLOPs, e.g. ten times the sweep's largest")
    law = load_law(law_file(sweep))
    run = target_of(sweep, law, flops)
    file = Path(f"{run.name}.yaml")
    write_new(file, to_yaml(run.recipe, exclude_none=True), f"--target {flops:g}: {file}")
    print(
        f"{file}: {run.parameters:,} parameters, {run.tokens:,} tokens in {run.steps:,} steps, {run.flops:.4g} FLOPs\n"
        f"{law.describe(run.recipe.model, run.tokens, run.recipe.optimizer.name)}\n"
        f"train it: isoflop pretrain {file}"
    )
    return 0


def require_own_folders(groups: list[Group], name: str, sweep: SweepConfig) -> None:
    """Refuse a folder with a run of another recipe, and files of other programs in place of a recipe or the law.

    Raises `UserError`.
    """
    try:
        require_own_law(f"{name}: output_dir", law_file(sweep))
        for run in (run for group in groups for run in group):
            RunFolder(run.recipe.output.run_dir).check_owner(run.recipe)
            file = recipe_file(Path(sweep.output_dir), run)
            if file.exists() and load_recipe(file).output.run_dir != run.recipe.output.run_dir:
                raise UserError(f"{file} exists already, and is not a recipe of this sweep; move it away")
    except UserError as error:
        raise UserError(f"{name}: {error}; for all runs of the sweep: its output_dir") from None


def print_states(groups: list[Group], as_numbers: bool) -> None:
    """Print the table, or its numbers."""
    states = [state_of(run) for group in groups for run in group]
    print(json.dumps(states_json(states), indent=1) if as_numbers else report(states), flush=True)


def repetitions(groups: list[Group], manifest: Manifest) -> list[str]:
    """Return a warning for each run that repeats its text: repeated tokens are worth less, and the law takes them for fresh."""
    num_tokens = sum(split.windows for split in manifest.split("train")) * manifest.sequence_length
    return [
        f"warning: {run.name}: {run.tokens / num_tokens:.2f} epochs of {num_tokens:,} tokens; a law of fresh data needs more text"
        for group in groups
        for run in group
        if run.tokens > num_tokens
    ]


def write_slurm(options: SweepOptions, groups: list[Group], sweep: SweepConfig) -> int:
    """Write a job array with a task for each group; the last one to end fits the law."""
    assert options.slurm is not None
    again = ["isoflop", "sweep", options.sweep, "--launch", options.config]
    folder = Path(sweep.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_new(
        Path(options.slurm),
        f"""#!/usr/bin/env bash
#SBATCH --job-name={Path(options.sweep).stem}
#SBATCH --array=0-{len(groups) - 1}
#SBATCH --gpus-per-task=1
#SBATCH --output={folder}/slurm-%A_%a.log
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# Time limit, partition and account: give them to sbatch, or add them here. A task that is stopped resumes when it runs again.
exec {shlex.join(again)} --only "$SLURM_ARRAY_TASK_ID"
""",
        f"--slurm {options.slurm}",
    )
    print(f"{options.slurm} has {len(groups)} tasks; start them with: sbatch {shlex.quote(options.slurm)}")
    return 0
