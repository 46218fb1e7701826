"""Plan a recipe or a compute budget: memory, time, cost and predicted loss, before anything is trained.

`isoflop.plan(recipe)` is `isoflop.plan.planner.plan`; `budgets.plan_budget` finds the best shapes for a budget.
"""

from isoflop.utils.callable_package import make_callable

make_callable(__name__, "isoflop.plan.planner")
