"""The command `sweep`: prepare the data, train what is left, fit the law; or say what there is to do."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import NamedTuple

from isoflop.data.manifest import Manifest
from isoflop.disk import write_aside
from isoflop.errors import UserError
from isoflop.prepare.command import prepare
from isoflop.stop import EXIT_RESUME
from isoflop.sweep.design import Group, groups_of
from isoflop.sweep.runner import Runner, slots_of
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


def sweep_command(request: Request) -> int:
    """Carry out a request; returns the exit code."""
    suite = load_suite(request.sweep)
    groups = groups_of(suite)
    if request.dry_run:
        tell(groups, request.as_json)
        return 0
    if request.only is not None and not 0 <= request.only < len(groups):
        raise UserError(f"--only {request.only}: the sweep has groups 0 to {len(groups) - 1}; --dry-run lists its runs")
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
    from isoflop.fit.command import Request as FitRequest
    from isoflop.fit.command import fit_command

    return fit_command(FitRequest((suite.output_dir,), out=f"{suite.output_dir}/law.json"))


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
    write_aside(
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
    )
    print(f"{request.slurm} has {len(groups)} tasks; start them with: sbatch {shlex.quote(request.slurm)}")
    return 0
