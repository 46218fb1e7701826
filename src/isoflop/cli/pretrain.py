"""`isoflop pretrain`: train a recipe on its prepared data, or resume it from its newest intact checkpoint."""

from __future__ import annotations

from isoflop.cli import launch
from isoflop.cli.parser import Parser
from isoflop.config.loading import load_recipe

DESCRIPTION = """\
Train a recipe on its prepared data. The same command resumes a run that was
stopped, from its newest intact checkpoint, bit for bit.

  isoflop pretrain quickstart
  isoflop pretrain llama2_1.36b --launch 2gpu_zero1 training.max_steps=2000
"""


def main(arguments: list[str], prog: str) -> int:
    """Read the recipe before torch is imported: a mistake in it is reported at once. Returns the exit code."""
    parser = Parser(prog=prog, description=DESCRIPTION)
    parser.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. training.max_steps=2000")
    launch.add_options(parser)
    parser.add_argument("--resume", action="store_true", help="fail without a checkpoint (default: resume if there is one)")
    parser.add_argument("--resume-from", metavar="STEP", help="return to that step's checkpoint; later ones are deleted")
    parser.add_argument("--eval-only", "--eval_only", action="store_true", help="print the newest checkpoint's validation loss")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check everything, do one step, write nothing")
    parser.add_argument("--profile", metavar="STEPS", type=int, help="trace so many steps after the first 3 into RUN_DIR/profile")
    given = parser.parse_intermixed_args(arguments)
    if given.profile is not None and given.profile < 1:
        parser.error(f"--profile {given.profile}: STEPS is the number of steps to trace, 1 or more")
    if given.profile and (given.dry_run or given.eval_only):
        other = "--dry-run" if given.dry_run else "--eval-only"
        parser.error(f"--profile traces training steps after the first 3, and {other} trains one at most: leave one out")
    if given.num_processes and not given.launch:
        parser.error(f"--num-processes {given.num_processes} needs --launch CONFIG, e.g. --launch 2gpu_zero1")
    recipe = load_recipe(given.recipe, given.overrides)
    if given.launch:
        launch.exec_launcher("pretrain", arguments, given)

    from isoflop.checkpoint.manager import NEWEST
    from isoflop.train.command import pretrain_command

    resume = given.resume_from or (NEWEST if given.resume else None)
    return pretrain_command(recipe, resume, given.eval_only, given.dry_run, given.profile or 0)
