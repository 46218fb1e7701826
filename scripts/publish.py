"""Push a run to the Hub: python scripts/publish.py runs/quickstart --repo-id user/name. The same as `isoflop publish`."""

import sys

try:
    from isoflop.cli.main import run_script
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run `make setup` once in the checkout, then `source .venv/bin/activate`")

if __name__ == "__main__":
    run_script("publish")
