"""isoflop: compute-optimal pretraining on the Hugging Face stack.

    recipe = isoflop.load_recipe("quickstart", ["training.max_steps=50"])
    isoflop.plan(recipe)                      # Plan: loss, memory and time, before the run
    isoflop.prepare(recipe)                   # Manifest: windows of token ids on disk
    run = isoflop.pretrain(recipe)            # RunSummary: losses, speed, memory
    isoflop.evaluate("runs/quickstart")       # scores by lm-eval
    isoflop.compare(["runs/a", "runs/b"])     # Comparison: runs side by side
    law = isoflop.fit("runs.csv").law         # Fit and its Law; isoflop.load_law reads a published one
    isoflop.publish("runs/quickstart", repo_id="user/name")

Importing this module is instant; each function imports what it needs when it is first used. Results have `to_dict()`, rows have
`to_frame()`, and notebooks show them as tables and figures. Whatever the caller can correct raises `UserError`. Functions log to
the logger "isoflop" and print nothing but progress bars.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isoflop.config.loading import load_recipe
    from isoflop.scaling.fit import fit
    from isoflop.scaling.laws import load_law
    from isoflop.train.trainer import pretrain
    from isoflop.utils.errors import UserError

__version__ = "0.1.0"
__all__ = ["UserError", "compare", "evaluate", "fit", "load_law", "load_recipe", "plan", "prepare", "pretrain", "publish"]

_MODULES = {
    "UserError": "isoflop.utils.errors",
    "fit": "isoflop.scaling.fit",
    "load_law": "isoflop.scaling.laws",
    "load_recipe": "isoflop.config.loading",
    "pretrain": "isoflop.train.trainer",
}
# Packages that can be called: `isoflop.plan(...)` is `isoflop.plan.planner.plan(...)`. See `utils/callable_package.py`.
_PACKAGES = ("compare", "evaluate", "plan", "prepare", "publish")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"isoflop.{name}")
    raise AttributeError(f"module 'isoflop' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
