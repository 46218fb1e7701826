"""What a budget buys, or what a recipe costs: python scripts/plan.py --help. The same as `isoflop plan`."""

import sys

try:
    from isoflop.cli.main import run_script
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run `make setup` once in the checkout, then `source .venv/bin/activate`")

if __name__ == "__main__":
    run_script("plan")
