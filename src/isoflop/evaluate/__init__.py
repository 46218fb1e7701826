"""Downstream evaluation with lm-eval: tasks, scores and published references.

Entered by `isoflop.evaluate(...)` and `run.evaluate_command` for a saved model, and by `harness.Downstream` during training.
"""

from isoflop.utils.callable_package import make_callable

make_callable(__name__, "isoflop.evaluate.run")
