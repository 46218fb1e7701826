"""Evaluate a model with lm-eval: python scripts/run_eval.py runs/quickstart --suite quick. The same as `isoflop eval`."""

import sys

try:
    from isoflop.cli.main import run_script
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run `make setup` once in the checkout, then `source .venv/bin/activate`")

if __name__ == "__main__":
    run_script("eval")
