"""Write a run's model as GGUF: python scripts/export.py runs/quickstart --to gguf. The same as `isoflop export`."""

import sys

try:
    from isoflop.cli.main import run_script
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run `make setup` once in the checkout, then `source .venv/bin/activate`")

if __name__ == "__main__":
    run_script("export")
