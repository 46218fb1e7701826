"""Pretrain a recipe, or resume it; the same as `isoflop pretrain`.

accelerate launch --config_file accelerate_configs/cpu.yaml scripts/pretrain.py recipes/quickstart.yaml [section.key=value ...]
"""

import sys

try:
    from isoflop.cli.main import run_script
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; run `make setup` once in the checkout, then `source .venv/bin/activate`")

if __name__ == "__main__":
    run_script("pretrain")
