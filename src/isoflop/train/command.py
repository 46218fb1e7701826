"""What `isoflop pretrain` adds to `pretrain`: signal handlers, the allocator's settings, printed results, exit codes."""

from __future__ import annotations

import os

import torch

from isoflop.config.recipe import Recipe
from isoflop.train import trainer
from isoflop.train.cpu import tune_glibc_malloc
from isoflop.train.distributed import asked_for_cpu
from isoflop.train.outcome import report
from isoflop.train.run_folder import RunFolder
from isoflop.train.signals import EXIT_RESUME, StopRequest, leave_after_lost_rank
from isoflop.utils.output import log_to_console


def pretrain_command(
    recipe: Recipe, resume: str | None = None, eval_only: bool = False, dry_run: bool = False, profile_steps: int = 0
) -> int:
    """Train a recipe, or only evaluate or check it; returns the exit code."""
    log_to_console()
    is_main = os.environ.get("RANK", "0") == "0"
    folder = RunFolder(recipe.output.run_dir)
    if not (eval_only or dry_run):
        folder.check_owner(recipe)
        if summary := folder.read_summary():
            if is_main:
                print(f"{folder.path} is finished:")
                print(report(folder, summary), flush=True)
            return 0
    with StopRequest() as stop:
        if asked_for_cpu() or not torch.accelerator.is_available():
            tune_glibc_malloc()
        try:
            if dry_run:
                trainer.dry_run(recipe, stop)
            elif eval_only:
                found = trainer.evaluate_checkpoint(recipe, resume, stop)
                if is_main:
                    print(
                        f"step {found.step}: validation loss {found.val_loss:.6f} nats per token ({found.bits_per_byte:.4f} bits"
                        f" per byte); token frequencies alone: {found.unigram_entropy_nats:.4f}"
                    )
            else:
                trainer.pretrain(recipe, resume=resume, num_profiled_steps=profile_steps, stop=stop)
        except trainer.Stopped as stopped:
            if is_main:
                print(stopped, flush=True)
            return EXIT_RESUME
        except RuntimeError as error:
            leave_after_lost_rank(error)
            raise
    return 0
