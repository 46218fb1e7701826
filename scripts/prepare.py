"""Tokenize and pack a recipe's data: python scripts/prepare.py recipes/quickstart.yaml [section.key=value ...]."""

import argparse
import sys

from isoflop.errors import run_command
from isoflop.recipe_file import load_recipe


def main(argv: list[str] | None = None) -> int:
    """Read the recipe first: a mistake in it costs no import of the libraries behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a YAML file of recipes/")
    parser.add_argument("overrides", nargs="*", help="section.key=value, e.g. training.sequence_length=1024")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(arguments.recipe, arguments.overrides)

    from isoflop.prepare import prepare

    prepare(recipe)
    return 0


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
