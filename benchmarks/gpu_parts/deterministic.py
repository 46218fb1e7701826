"""Pretrain with torch's deterministic algorithms, or kill the process in a step.

python -m gpu_parts.deterministic [--deterministic] [--kill-at STEP] RECIPE [section.key=value ...]; on a GPU also set
CUBLAS_WORKSPACE_CONFIG=:4096:8 and TORCHINDUCTOR_DETERMINISTIC=1 in the environment, which are read before this can set them.
"""

from __future__ import annotations

import argparse
import os
import signal
from typing import Any

import torch

from isoflop.config.loading import load_recipe
from isoflop.train import trainer as pretrain
from isoflop.train.command import pretrain_command
from isoflop.utils.command import run_command


def main() -> int:
    """Train, as scripts/pretrain.py does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--kill-at", type=int, help="SIGKILL when this step begins")
    given = parser.parse_intermixed_args()
    if given.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)  # an operation without such a form is named in the row
        torch.backends.cudnn.benchmark = False
    if given.kill_at:
        step, begun = pretrain.train_step, []

        def mortal(*arguments: Any, **named: Any) -> Any:
            begun.append(1)
            if len(begun) == given.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*arguments, **named)

        pretrain.train_step = mortal
    return pretrain_command(load_recipe(given.recipe, given.overrides))


if __name__ == "__main__":
    run_command(main)
