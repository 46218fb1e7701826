"""Pretrain a recipe on its prepared data, or go on where a run was stopped.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py recipes/quickstart.yaml [section.key=value ...]
"""

import argparse
import sys

from isoflop.errors import run_command
from isoflop.recipe_file import load_recipe


def main(argv: list[str] | None = None) -> int:
    """Read the recipe first: a mistake in it costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. training.max_steps=2000")
    parser.add_argument("--resume", action="store_true", help="require a checkpoint (without it: go on from the newest, if any)")
    parser.add_argument("--resume-from", metavar="STEP", help="go back to that step's checkpoint; later ones are deleted")
    parser.add_argument("--eval-only", "--eval_only", action="store_true", help="measure the newest checkpoint's validation loss")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="check everything, do one step, write nothing")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        type=int,
        help="trace STEPS optimizer steps after the first 3 into RUN_DIR/profile",
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.profile is not None and arguments.profile < 1:
        parser.error(f"--profile {arguments.profile}: STEPS is the number of steps to trace, 1 or more")
    if arguments.profile and (arguments.dry_run or arguments.eval_only):
        parser.error(
            f"--profile traces training steps after the first 3, and {'--dry-run' if arguments.dry_run else '--eval-only'} trains"
            " no more than one: leave one of the two out"
        )
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    from isoflop.pretrain import pretrain
    from isoflop.resume import NEWEST

    resume = arguments.resume_from or (NEWEST if arguments.resume else None)
    return pretrain(recipe, resume, arguments.eval_only, arguments.dry_run, arguments.profile or 0)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
